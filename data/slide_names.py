"""A short, safe, unique and lasting name for every slide file.

A slide's id is its file's stem with everything but letters, digits, ``-`` and ``_`` turned into ``-`` (a dot would end the key of
a WebDataset sample). Where two files share one, the folder's name is put in front, and its parent's, until they
differ. A name once given is kept: the ids of an earlier run are passed in as ``known``.
"""

import re
from collections import defaultdict
from pathlib import Path

from data.fault import Fault


def name_slides(paths: list[Path], known: dict[Path, str]) -> dict[Path, str]:
    """Ids for ``paths``, each unique among them and different from the ids in ``known`` of other files.

    ``known`` maps the files of an earlier run to their ids. A known file that has moved (gone from where it was, and the
    same name now found elsewhere) keeps its id. Raises Fault where two paths cannot be told apart.
    """
    names = {path: known[path] for path in paths if path in known}
    taken = {name for path, name in known.items() if path in names or path.exists()}
    waiting = [path for path in paths if path not in names]
    depth = 1
    while waiting:
        alike: dict[str, list[Path]] = defaultdict(list)
        for path in waiting:
            alike[_safe(path, depth)].append(path)
        for name, group in alike.items():
            if len(group) == 1 and name not in taken:
                names[group[0]] = name
                taken.add(name)
        still = [path for path in waiting if path not in names]
        if still and depth > max(len(path.parts) for path in still):
            raise Fault(f"{still[0]} and another slide get the same name, {_safe(still[0], depth)}: rename one of them")
        waiting, depth = still, depth + 1
    return names


def _safe(path: Path, depth: int) -> str:
    """The last ``depth`` parts of the path, the suffix left out, as one word."""
    parts = [part for part in path.with_suffix("").parts if part != path.anchor]
    return re.sub(r"[^A-Za-z0-9_-]", "-", "-".join(parts[-depth:]))
