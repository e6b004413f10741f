"""Which Parquet files are meant: from files, folders, globs and URLs, the hub's data sets among them."""

import glob
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data.fault import Fault
from data.git_lfs import refuse_pointer
from data.remote import find_files, is_remote

ENDINGS = (".parquet", ".parq", ".pq")


def list_parquet(named: list[str]) -> list[str]:
    """Parquet files, each once, by whatever links, sorted within each name that leads to them. A folder, on a disk or
    behind a URL, is searched through; ``hf://datasets/ORG/NAME`` is one. Raises Fault for a name that leads to
    nothing."""
    found: dict[str, str] = {}
    for file in (file for name in named for file in _named(name)):
        found.setdefault(file if is_remote(file) else os.path.realpath(file), file)
    if not found:
        raise Fault("data.files is empty: give Parquet files, folders of them, or URLs.")
    return list(found.values())


def _named(name: str) -> Iterator[str]:
    if is_remote(name):
        if name.partition("?")[0].endswith(ENDINGS) and "*" not in name:
            yield name
            return
        files = [url for ending in ENDINGS for url in find_files(name, ending)]
    else:
        path = Path(name).expanduser()
        if path.is_file():
            refuse_pointer(path)
            yield str(path.absolute())
            return
        inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = [str(file.absolute()) for file in inside if file.suffix.lower() in ENDINGS and not _hidden(file, path)]
        for file in islice(filter(os.path.isfile, files), 1):  # of a clone of the hub's all are, or none
            refuse_pointer(Path(file))
    if not files:
        raise Fault(f"there is no Parquet file at {name} (endings {' '.join(ENDINGS)})")
    yield from sorted(files)


def _hidden(file: Path, folder: Path) -> bool:
    """Whether it is what an operating system or a half-done download left behind: ``._x.parquet``, ``.cache/…``."""
    own = file.relative_to(folder).parts if folder.is_dir() else file.parts[-1:]
    return any(part.startswith(".") for part in own)
