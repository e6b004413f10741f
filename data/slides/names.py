"""A short, safe, unique and lasting name for every slide: of its file, or in place of the one that another program gave
it.

A slide's id is its file's stem with everything but letters, digits, ``-`` and ``_`` turned into ``-`` (a dot would end
the key of a WebDataset sample). Where files of several folders share one, the folder's name is put in front, and its
parent's, until they differ. A short hash of the file's name is appended where files of one folder share one (``S1.2``
beside ``S1-2``, ``a.tif`` beside ``a.tiff``), and where letters were lost. A name once given is kept: the ids of an
earlier run are passed in as ``known``.

An id becomes part of files' names, so what a foreign index, tar or file calls a slide (``../../x``, ``/etc/x``, ``a
b``) goes through the same rule, in `safe_ids`, before anything else sees it.
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
LONGEST = 240  # bytes of an id: a file's name has 255, endings included


def name_slides(paths: list[Path], known: dict[Path, str]) -> dict[Path, str]:
    """Ids for ``paths``, each unique among them and different from the ids in ``known`` of other files.

    ``known`` maps the files of an earlier run to their ids. A known file keeps its id under another name for it
    (through a link), and where it has moved (gone from where it was, and the same name now found elsewhere).
    """
    names = {path: known[path] for path in paths if path in known}
    if known and len(names) < len(paths):
        files = {os.path.realpath(path): name for path, name in known.items()}
        names |= {
            path: files[file] for path in paths if path not in names and (file := os.path.realpath(path)) in files
        }
    taken = {*names.values(), *(name for path, name in known.items() if path.exists())}
    waiting = [path for path in paths if path not in names]
    depth = 1
    while waiting:
        alike: dict[str, list[Path]] = defaultdict(list)
        for path in waiting:
            alike[_id(_words(path, depth))].append(path)
        for name, group in alike.items():
            if len({path.parent for path in group}) > 1:
                continue  # their folders' names tell them apart
            own = [path for path in group if _words(path, depth) == name] if len(group) > 1 else group
            if len(own) == 1 and name not in taken:
                names[own[0]] = name
                taken.add(name)
            for path in group if len(group) > 1 else ():
                if path not in names:
                    names[path] = _hashed(path.name, name, taken)
                    taken.add(names[path])
        if depth > max(len(path.parts) for path in waiting):
            for path in waiting:
                names.setdefault(path, _hashed(str(path), _id(_words(path, 1)), {*taken, *names.values()}))
        waiting, depth = [path for path in waiting if path not in names], depth + 1
    return names


def _words(path: Path, depth: int) -> str:
    """The last ``depth`` parts of the path, the suffix left out, as one word."""
    parts = [part for part in path.with_suffix("").parts if part != path.anchor]
    return "-".join(parts[-depth:])


def safe_ids(names: Sequence[str]) -> list[str]:
    """Ids for slides that other programs named, in their order; equal names get equal ids, different ones different
    ids.

    A name that is an id stays. A short hash of the name is appended where two would get the same id, or where letters
    were lost on the way (accents, a script of its own, what is too long), so that ids don't depend on who else is there
    but in the first case.
    """
    alike: dict[str, set[str]] = defaultdict(set)
    for name in names:
        alike[UNSAFE.sub("-", name)].add(name)
    ids = {name: name for name in names if _is_id(name)}
    taken = set(ids)
    for plain, group in alike.items():
        for name in sorted(group - ids.keys()):
            ids[name] = plain if len(group) == 1 and not _loses_letters(name, plain) else _hashed(name, plain, taken)
            taken.add(ids[name])
    return [ids[name] for name in names]


def _id(name: str) -> str:
    """The id of a name that nobody else's is like."""
    plain = UNSAFE.sub("-", name)
    return name if _is_id(name) else plain if not _loses_letters(name, plain) else _hashed(name, plain, set())


def _is_id(name: str) -> bool:
    return 0 < len(name) <= LONGEST and not UNSAFE.search(name)


def _loses_letters(name: str, plain: str) -> bool:
    """Whether more than signs and blanks of ``name`` is missing from ``plain``, or hardly anything is left."""
    lost = any(letter.isalnum() for letter in UNSAFE.findall(name))
    return lost or len(plain) > LONGEST or not re.search("[A-Za-z0-9]", plain)


def _hashed(name: str, plain: str, taken: set[str]) -> str:
    """``plain`` with as many hexadecimal digits of the name's hash as it takes to be like none of ``taken``; eight, but
    for who tries."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=32).hexdigest()
    plain = plain if re.search("[A-Za-z0-9]", plain) else "slide"
    digits = 8
    while f"{plain[: LONGEST - 1 - digits]}-{digest[:digits]}" in taken:
        digits += 8
    return f"{plain[: LONGEST - 1 - digits]}-{digest[:digits]}"
