"""Where every tile lies in a folder of tar shards, without ever opening a tar to look.

    <folder>/tiles-000000.tar …          the shards, for anyone's WebDataset
    <folder>/index/tiles-000000.npz …    one record a shard, written with it: the shard counts once both are there
    <folder>/index.npz                   all of them in one file, columns uncompressed, so that they are memory-mapped

A tile costs 14 bytes in ``index.npz`` (16 where a JPEG is over 64 KiB, 18 with shards over 4 GiB): byte offset and length
in its tar, level-0 x and y. Which tar and which slide a tile belongs to is kept as runs. 1.4 billion tiles are 20 GB on
disk and next to nothing in memory until they are asked for.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.fault import Fault
from data.npz_files import SPOILT, mapped
from data.remote import RemoteColumn, RemotePath, Truncated, is_remote, url_within
from data.shards.layout import COLUMNS, RUNS, places_in
from data.slides.names import safe_ids


class ShardIndex:
    """The tiles of a folder of shards, in the order in which they lie in them.

    ``files`` and ``slides`` are names; slides have ids of ours, fit for files' names, whatever a foreign index calls
    them (`safe_ids`; the name that they came with is their fact ``slide``). Per tile, (N,) each: ``file`` and ``slide``
    (indices into those), ``offset`` and ``length`` (bytes of the JPEG in its tar), ``x`` and ``y`` (level-0 pixels).
    ``file_start`` (files + 1,) int64 are the rows at which the tars begin. ``digest`` is a hash of names, places and
    lengths, the same on every machine. ``meta`` says how the shards were made, and holds in ``meta["slides"]`` one list
    for each of `SLIDE_FACTS`.

    The folder may be a URL: then the columns ``offset, length, x, y`` are read from there a page at a time
    (`RemoteColumn`). An index may lie in another folder than its shards (``meta["location"]``), as that of shards that
    can't be written to.
    """

    def __init__(self, folder: Path | str, columns: dict[str, Any], meta: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.location: Path | str = meta.get("location") or folder
        self.offset, self.length, self.x, self.y = (columns[name] for name in COLUMNS)
        self.file_start, self.run_start, self.run_slide = (columns[name] for name in RUNS)
        self.meta = meta
        self.files: list[str] = meta["files"]
        self.slides: list[str] = safe_ids(meta["slides"]["slide"])
        self.digest: str = meta["digest"]
        for name in (*self.files, *filter(None, meta["slides"]["coordinates"])):
            if str(name).startswith("/") or ".." in str(name).split("/"):
                raise Fault(
                    f"{folder}/index.npz names a file outside of its folder, {name}: it is damaged, or not to be"
                    " trusted."
                )

    def __len__(self) -> int:
        return len(self.offset)

    @cached_property
    def file(self) -> np.ndarray:
        """(N,) int32: which tar holds each tile. Made on first use; at a billion tiles use ``file_start``."""
        return np.repeat(np.arange(len(self.files), dtype=np.int32), np.diff(self.file_start))

    @cached_property
    def slide(self) -> np.ndarray:
        """(N,) int32: which slide each tile is from. Made on first use; at a billion tiles use the runs."""
        return np.repeat(self.run_slide, np.diff(self.run_start))

    def file_of(self, row: int) -> int:
        """The number of the tar that holds a tile."""
        return bisect_right(self._file_bounds, row) - 1

    def slide_of(self, row: int) -> str:
        """The slide of a tile."""
        return self.slides[self.run_slide[bisect_right(self._run_bounds, row) - 1]]

    def mpp_of(self, row: int) -> float | None:
        """µm/px of a tile, None where nobody recorded it."""
        stated = self.meta["slides"]["mpp"][self.run_slide[bisect_right(self._run_bounds, row) - 1]]
        return float(stated) if stated else None

    @cached_property
    def _file_bounds(self) -> list[int]:
        return self.file_start.tolist()  # for one row, ten times as quick to search as the array

    @cached_property
    def _run_bounds(self) -> list[int]:
        return self.run_start.tolist()

    def facts(self, slide: int) -> dict[str, Any]:
        """What is known about slide number ``slide``: a value for each of `SLIDE_FACTS`."""
        return {name: values[slide] for name, values in self.meta["slides"].items()}

    def rows_of(self, slide: int) -> np.ndarray:
        """Rows of one slide's tiles, int64, ascending."""
        runs = np.nonzero(self.run_slide == slide)[0]
        pieces = [np.arange(self.run_start[run], self.run_start[run + 1]) for run in runs]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    @cached_property
    def tiles_here(self) -> dict[int, int]:
        """How many tiles of each slide there are, by the slide's number: all of them, or, of an index of some tars, those
        that lie in these."""
        counts = np.zeros(len(self.slides), np.int64)
        np.add.at(counts, self.run_slide, np.diff(self.run_start))
        return {slide: int(counts[slide]) for slide in np.flatnonzero(counts).tolist()}

    def only(self, files: Sequence[str]) -> "ShardIndex":
        """The tiles of some of the tars alone, each tar once, in the order in which they are here."""
        wanted = set(files)
        chosen = [number for number, name in enumerate(self.files) if name in wanted]
        rows = [range(int(self.file_start[file]), int(self.file_start[file + 1])) for file in chosen]
        columns: dict[str, Any] = {name: _joined(getattr(self, name), rows) for name in COLUMNS}
        columns["file_start"] = np.cumsum([0, *map(len, rows)])
        starts: list[int] = []
        slides: list[int] = []
        for first, of_file in zip(columns["file_start"].tolist(), rows, strict=False):
            run = bisect_right(self._run_bounds, of_file.start) - 1
            while run < len(self.run_slide) and self._run_bounds[run] < of_file.stop:
                starts.append(first + max(self._run_bounds[run], of_file.start) - of_file.start)
                slides.append(int(self.run_slide[run]))
                run += 1
        columns["run_start"], columns["run_slide"] = np.array([*starts, sum(map(len, rows))]), np.array(slides)
        names = [self.files[file] for file in chosen]
        digest = hashlib.blake2b(json.dumps([self.digest, names]).encode(), digest_size=8).hexdigest()
        sizes = [self.meta["sizes"][file] for file in chosen]
        meta = self.meta | {"location": self.location, "files": names, "sizes": sizes, "digest": digest}
        return ShardIndex(self.folder, columns, meta)

    @cached_property
    def remote(self) -> bool:
        """Whether the shards lie behind a URL."""
        return is_remote(self.location)

    def url(self, file: int) -> str:
        """The URL of tar number ``file`` where the shards are remote."""
        return url_within(str(self.location), self.files[file])

    def place(self, file: int) -> str:
        """Where tar number ``file`` lies, for a message."""
        return self.url(file) if self.remote else str(self.path(file))

    def path(self, file: int) -> Path:
        """The path of tar number ``file``. Raises Fault where it has none, behind a URL."""
        if self.remote:
            raise Fault(
                f"{self.location} is remote, and this command reads shards on a disk only: copy them there first"
            )
        return Path(self.location) / self.files[file]

    @classmethod
    def open(cls, folder: Path | str, complete: bool = True) -> "ShardIndex":
        """The index of a folder of shards, memory-mapped or behind a URL. Raises Fault where there are no shards, no
        index, or (unless ``complete`` is False) a shard is gone (which a remote folder isn't asked)."""
        if is_remote(folder):
            meta, columns = _read_remote(str(folder))
            return cls(str(folder), columns, meta)
        folder = Path(folder)
        path = folder / "index.npz"
        present = (
            {entry.name for entry in os.scandir(folder) if entry.name.endswith(".tar")} if folder.is_dir() else set()
        )
        if not present and not path.exists():
            raise Fault(
                f"there are no tile shards in {folder}: make some with 'pretrain shard slides=… out={folder}'; what lies"
                f" there instead, 'pretrain shards index shards={folder}' says"
            )
        if not path.exists():
            if (folder / "plan.json").exists():
                raise Fault(f"the shards in {folder} aren't finished: run the same 'pretrain shard' command again")
            raise Fault(
                f"the shards in {folder} have no index yet: make it with 'pretrain shards index shards={folder}'"
            )
        try:
            with path.open("rb") as file:
                meta, places = places_in(file)
                columns = {name: mapped(path, place) for name, place in places.items()}
        except SPOILT as error:
            raise Fault(
                f"{path} is damaged ({error}): delete it and run 'pretrain shards index shards={folder}', which"
                " remakes it"
            ) from error
        index = cls(folder, columns, meta)
        if index.remote:
            return index
        there = Path(index.location)
        if there != folder:
            present = {entry.name for entry in os.scandir(there)} if there.is_dir() else set()
        elif not present and complete:
            raise Fault(f"there are no tile shards in {folder}: make some with 'pretrain shard slides=… out={folder}'")
        gone = [name for name in index.files if name not in present]
        if gone and complete:
            raise Fault(
                f"{index.path(index.files.index(gone[0]))} is in the index but not on disk ({len(gone)} such): put it"
                " back, or run 'pretrain shard' again"
            )
        return index


def _joined(column: Any, rows: Sequence[range]) -> Any:
    """Some stretches of a column; of one stretch, mapped as it is."""
    pieces = [column[of.start : of.stop] for of in rows]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def read_jpeg(descriptor: int, offset: int, length: int) -> bytes:
    """``length`` bytes at ``offset`` of an open tar. Raises Truncated, a Fault, where the tar ends before."""
    data = os.pread(descriptor, length, offset)
    while 0 < len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    if len(data) != length:
        raise Truncated(
            f"a shard ends {length - len(data)} bytes before the end of the tile at byte {offset}: it is truncated,"
            " make it again"
        )
    return data


def _read_remote(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``meta`` and columns of the index in a remote folder: runs are read now, the columns of tiles when they are asked
    for."""
    url = url_within(folder, "index.npz")
    try:
        with RemotePath(url).open() as raw:
            meta, places = places_in(raw)
    except FileNotFoundError as error:
        raise Fault(
            f"there is no {url}: make an index of those shards with 'pretrain shards index shards={folder} out=FOLDER',"
            " and train on FOLDER"
        ) from error
    except (*SPOILT, Truncated) as error:
        raise Fault(f"{url} is damaged ({error}): remake it where the shards were made, and upload it again") from error
    columns: dict[str, Any] = {}
    for name, (dtype, start, rows) in places.items():
        columns[name] = RemoteColumn(url, dtype, start, rows)
        if name in RUNS:
            columns[name] = columns[name][:]
    return meta, columns
