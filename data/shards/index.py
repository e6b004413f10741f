"""Where every tile lies in a folder of tar shards, without ever opening a tar to look.

    <folder>/tiles-000000.tar …          the shards, for anyone's WebDataset
    <folder>/index/tiles-000000.npz …    one record a shard, written with it: the shard counts once both are there
    <folder>/index.npz                   all of them in one file, columns uncompressed, so that they are memory-mapped

A tile costs 14 bytes in `index.npz` (16 where a JPEG is over 64 KiB, 18 with shards over 4 GiB): byte offset and length
in its tar, level-0 x and y. Which tar and which slide a tile belongs to is kept as runs. 1.4 billion tiles are 20 GB on
disk and next to nothing in memory until they are asked for.
"""

import hashlib
import json
import os
import tokenize
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.fault import Fault
from data.files import appearing
from data.remote import RemoteColumn, RemotePath, Truncated, is_remote, url_within
from data.slides.names import safe_ids

COLUMNS = ("offset", "length", "x", "y")
CHECKSUMS = (
    "crc32",
    "json_crc32",
)  # of each tile's JPEG and JSON: in the shards' records, for `recorded_checksums` and verify
# What reading an npz raises where its bytes were changed: zipfile, json, and numpy's way of reading a header.
SPOILT = (
    zipfile.BadZipFile,
    ValueError,
    KeyError,
    EOFError,
    OSError,
    SyntaxError,
    tokenize.TokenError,
    NotImplementedError,
    zlib.error,
)
RUNS = ("file_start", "run_start", "run_slide")
# Facts about each slide, one list each in ``meta["slides"]``. None where a shard of another program doesn't tell.
FACTS = ("slide", "source", "patient", "width", "height", "mpp_level0", "mpp", "tile_size", "tile_size_level0",
         "level", "downsample", "thumbnail_downsample", "tiles", "coordinates")  # fmt: skip


class ShardIndex:
    """The tiles of a folder of shards, in the order in which they lie in them.

    ``files`` and ``slides`` are names; slides have ids of ours, fit for files' names, whatever a foreign index calls
    them (`safe_ids`; the name that they came with is their fact ``slide``). Per tile, (N,) each: ``file`` and ``slide``
    (indices into those), ``offset`` and ``length`` (bytes of the JPEG in its tar), ``x`` and ``y`` (level-0 pixels).
    ``file_start`` (files + 1,) int64 are the rows at which the tars begin. ``digest`` is a hash of names, places and
    lengths, the same on every machine. ``meta`` says how the shards were made, and holds in ``meta["slides"]`` one list
    for each of `FACTS`.

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
                    f"{folder}/index.npz names a file outside of its folder, {name}: it is damaged, or not to be trusted."
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

    @cached_property
    def _file_bounds(self) -> list[int]:
        return self.file_start.tolist()  # for one row, ten times as quick to search as the array

    @cached_property
    def _run_bounds(self) -> list[int]:
        return self.run_start.tolist()

    def facts(self, slide: int) -> dict[str, Any]:
        """What is known about slide number ``slide``: a value for each of `FACTS`."""
        return {name: values[slide] for name, values in self.meta["slides"].items()}

    def rows_of(self, slide: int) -> np.ndarray:
        """Rows of one slide's tiles, int64, ascending."""
        runs = np.nonzero(self.run_slide == slide)[0]
        pieces = [np.arange(self.run_start[run], self.run_start[run + 1]) for run in runs]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

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
            raise Fault(f"there are no tile shards in {folder}: make some with 'pretrain shard slides=… out={folder}'")
        if not path.exists():
            if (folder / "plan.json").exists():
                raise Fault(f"the shards in {folder} aren't finished: run the same 'pretrain shard' command again")
            raise Fault(
                f"the shards in {folder} have no index yet: make it with 'pretrain shards index shards={folder}'"
            )
        try:
            with path.open("rb") as file:
                meta, places = _read_npz(file)
                columns = {
                    # As plain arrays: looking up one row is three times as quick as in a memmap.
                    name: np.asarray(np.memmap(path, dtype, "r", start, (rows,))) if rows else np.empty(0, dtype)
                    for name, (dtype, start, rows) in places.items()
                }
        except SPOILT as error:
            raise Fault(
                f"{path} is damaged ({error}): delete it and run 'pretrain shards index shards={folder}', which remakes it"
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
                f"{index.path(index.files.index(gone[0]))} is in the index but not on disk ({len(gone)} such): put it back, or run 'pretrain shard' again"
            )
        return index


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
            f"a shard ends {length - len(data)} bytes before the end of the tile at byte {offset}: it is truncated, make it again"
        )
    return data


def merge_records(
    folder: Path, names: list[str], made: dict[str, Any], told: Mapping[str, dict[str, Any]] | None = None
) -> str:
    """Write ``index.npz`` from the records of the shards ``names`` and return its digest. Memory stays that of one
    record.

    ``made`` says how the shards were made and becomes the index's ``meta``. ``told``: the facts of slides, where the
    first record of each doesn't have them. An index that is up to date is left alone.
    """
    records = [json.loads(str(np.load(record_path(folder, name))["facts"])) for name in names]
    slides: dict[str, dict[str, Any]] = {}
    tiles: dict[str, int] = {}
    for record in records:
        for facts, count in zip(record["slides"], record["counts"], strict=True):
            slides.setdefault(facts["slide"], facts if told is None else told[facts["slide"]])
            tiles[facts["slide"]] = tiles.get(facts["slide"], 0) + count
    kept = [slide for slide in slides if tiles[slide]]
    table: dict[str, list[Any]] = {name: [slides[slide].get(name) for slide in kept] for name in FACTS}
    table["tiles"] = [tiles[slide] for slide in kept]
    full = [record for record in records if sum(record["counts"])]
    digest = hashlib.blake2b(digest_size=16)
    for record in full:
        digest.update(f"{record['file']} {record['digest']}\n".encode())
    meta = made | {"files": [record["file"] for record in full], "sizes": [record["size"] for record in full],
                   "digest": digest.hexdigest(), "slides": table}  # fmt: skip
    path = folder / "index.npz"
    if path.exists() and _same(path, meta):
        return meta["digest"]

    number = {slide: position for position, slide in enumerate(kept)}
    file_start = np.cumsum([0] + [sum(record["counts"]) for record in full], dtype=np.int64)
    runs = [(number[facts["slide"]], count) for record in full
            for facts, count in zip(record["slides"], record["counts"], strict=True) if count]  # fmt: skip
    run_start = np.cumsum([0] + [count for _, count in runs], dtype=np.int64)
    dtypes = {
        "offset": np.dtype(np.uint32 if max(meta["sizes"], default=0) < 2**32 else np.int64),
        "length": np.dtype(np.uint16 if max((record["longest"] for record in full), default=0) < 2**16 else np.uint32),
        "x": np.dtype(np.int32),
        "y": np.dtype(np.int32),
    }
    columns = {name: _recorded(folder, full, name) for name in COLUMNS}
    run_slide = np.array([n for n, _ in runs], dtype=np.int32)
    bounds: dict[str, np.ndarray] = {"file_start": file_start, "run_start": run_start, "run_slide": run_slide}
    write_shard_index(folder, meta, dtypes, columns, bounds)
    return meta["digest"]


def write_shard_index(
    folder: Path,
    meta: dict[str, Any],
    dtypes: dict[str, np.dtype],
    columns: Mapping[str, Iterable[np.ndarray]],
    runs: dict[str, np.ndarray],
) -> None:
    """Write ``index.npz``: ``columns`` piece by piece, one piece a shard, then ``runs`` and ``meta``; whole or not at
    all."""
    path = folder / "index.npz"
    with appearing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name in COLUMNS:
            _write_column(archive, name, dtypes[name], int(runs["file_start"][-1]), columns[name])
        for name in RUNS:
            _write_column(archive, name, runs[name].dtype, len(runs[name]), [runs[name]])
        archive.writestr("meta.json", json.dumps(meta))


def _recorded(folder: Path, records: list[dict[str, Any]], column: str) -> Iterator[np.ndarray]:
    return (np.load(record_path(folder, Path(record["file"]).stem))[column] for record in records)


def record_path(folder: Path, name: str) -> Path:
    """The record that is written with shard ``name``."""
    return folder / "index" / f"{name}.npz"


def recorded_checksums(index: ShardIndex, file: int) -> np.ndarray | None:
    """CRC-32 of each JPEG of tar number ``file``, uint32, as they were recorded with it; None where nobody did.

    Raises ValueError where the record is damaged or isn't this shard's.
    """
    path = record_path(index.folder, index.files[file].removesuffix(".tar"))
    try:
        with zipfile.ZipFile(path) as record:
            if f"{CHECKSUMS[0]}.npy" not in record.namelist():
                return None
            found = _int64(record.read(f"{CHECKSUMS[0]}.npy")).astype(np.uint32)
    except FileNotFoundError:
        return None
    except SPOILT as error:
        raise ValueError(f"its record {path} is damaged: {error}") from error
    if len(found) != index.file_start[file + 1] - index.file_start[file]:
        raise ValueError(f"its record {path} is of other tiles than the index")
    return found


def _int64(npy: bytes) -> np.ndarray:
    """The one-dimensional int64 array of a .npy file. numpy's own reader has Python's parser read the header, which
    threads of Python 3.11 can't do at the same time (SystemError: AST constructor recursion depth mismatch), and tiles
    are read by threads."""
    start = 10 + int.from_bytes(npy[8:10], "little")
    if npy[:8] != b"\x93NUMPY\x01\x00" or b"'descr': '<i8', 'fortran_order': False" not in npy[:start]:
        raise ValueError("its columns are not int64")
    return np.frombuffer(npy, "<i8", offset=start)


def write_record(folder: Path, name: str, facts: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
    """Write a shard's record: its columns, and ``facts`` with ``file, size, longest`` (bytes), ``slides`` (facts of
    each, in order) and ``counts`` (tiles of each). A digest is added. The record appears only when it is whole."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(
        "\n".join(f"{s['slide']} {count}" for s, count in zip(facts["slides"], facts["counts"], strict=True)).encode(
            errors="surrogatepass"
        )
    )
    for column in COLUMNS:
        digest.update(columns[column].astype("<i8").tobytes())
    path = record_path(folder, name)
    with appearing(path) as partial, partial.open("wb") as file:
        np.savez(file, facts=np.array(json.dumps(facts | {"digest": digest.hexdigest()})), **columns)  # type: ignore[arg-type]


def _write_column(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, rows: int, pieces: Iterable[np.ndarray]
) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(member, header)
        for piece in pieces:
            member.write(piece.astype(dtype).tobytes())


def _read_npz(raw: IO[bytes]) -> tuple[dict[str, Any], dict[str, tuple[np.dtype, int, int]]]:
    """``meta.json``, and where each column lies in the uncompressed npz: its dtype, first byte and number of rows."""
    places: dict[str, tuple[np.dtype, int, int]] = {}
    with zipfile.ZipFile(raw) as archive:
        meta = json.loads(archive.read("meta.json"))
        for name in (*COLUMNS, *RUNS):
            # A zip member's data begins behind its local header: 30 bytes, then the name and the extra field.
            start = archive.getinfo(f"{name}.npy").header_offset
            raw.seek(start + 26)
            raw.seek(start + 30 + sum(int.from_bytes(raw.read(2), "little") for _ in range(2)))
            np.lib.format.read_magic(raw)
            shape, _, dtype = np.lib.format.read_array_header_1_0(raw)
            places[name] = dtype, raw.tell(), shape[0]
    return meta, places


def _read_remote(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``meta`` and columns of the index in a remote folder: runs are read now, the columns of tiles when they are asked
    for."""
    url = url_within(folder, "index.npz")
    try:
        with RemotePath(url).open() as raw:
            meta, places = _read_npz(raw)
    except FileNotFoundError as error:
        raise Fault(
            f"there is no {url}: make an index of those shards with 'pretrain shards index shards={folder} out=FOLDER', and train on FOLDER"
        ) from error
    except (*SPOILT, Truncated) as error:
        raise Fault(f"{url} is damaged ({error}): remake it where the shards were made, and upload it again") from error
    columns: dict[str, Any] = {}
    for name, (dtype, start, rows) in places.items():
        columns[name] = RemoteColumn(url, dtype, start, rows)
        if name in RUNS:
            columns[name] = columns[name][:]
    return meta, columns


def _same(path: Path, meta: dict[str, Any]) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("meta.json")) == meta
    except (zipfile.BadZipFile, KeyError, ValueError):
        return False
