"""What is written with each shard, and what all these records make together: the folder's index."""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.files import appearing
from data.npz_files import SPOILT, read_int64
from data.shards.index import ShardIndex
from data.shards.layout import COLUMNS, SLIDE_FACTS, write_shard_index

CHECKSUMS = (
    "crc32",
    "json_crc32",
)  # of each tile's JPEG and JSON: in the shards' records, for `recorded_checksums` and verify


def record_path(folder: Path, name: str) -> Path:
    """The record that is written with shard ``name``."""
    return folder / "index" / f"{name}.npz"


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


def recorded_checksums(index: ShardIndex, file: int) -> np.ndarray | None:
    """CRC-32 of each JPEG of tar number ``file``, uint32, as they were recorded with it; None where nobody did.

    Raises ValueError where the record is damaged or isn't this shard's.
    """
    path = record_path(index.folder, index.files[file].removesuffix(".tar"))
    try:
        with zipfile.ZipFile(path) as record:
            if f"{CHECKSUMS[0]}.npy" not in record.namelist():
                return None
            found = read_int64(record.read(f"{CHECKSUMS[0]}.npy")).astype(np.uint32)
    except FileNotFoundError:
        return None
    except SPOILT as error:
        raise ValueError(f"its record {path} is damaged: {error}") from error
    if len(found) != index.file_start[file + 1] - index.file_start[file]:
        raise ValueError(f"its record {path} is of other tiles than the index")
    return found


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
    table: dict[str, list[Any]] = {name: [slides[slide].get(name) for slide in kept] for name in SLIDE_FACTS}
    table["tiles"] = [tiles[slide] for slide in kept]
    full = [record for record in records if sum(record["counts"])]
    digest = hashlib.blake2b(digest_size=16)
    for record in full:
        digest.update(f"{record['file']} {record['digest']}\n".encode())
    meta = made | {
        "files": [record["file"] for record in full],
        "sizes": [record["size"] for record in full],
        "digest": digest.hexdigest(),
        "slides": table,
    }
    path = folder / "index.npz"
    if path.exists() and _same(path, meta):
        return meta["digest"]

    number = {slide: position for position, slide in enumerate(kept)}
    file_start = np.cumsum([0] + [sum(record["counts"]) for record in full], dtype=np.int64)
    runs = [
        (number[facts["slide"]], count)
        for record in full
        for facts, count in zip(record["slides"], record["counts"], strict=True)
        if count
    ]
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


def _recorded(folder: Path, records: list[dict[str, Any]], column: str) -> Iterator[np.ndarray]:
    return (np.load(record_path(folder, Path(record["file"]).stem))[column] for record in records)


def _same(path: Path, meta: dict[str, Any]) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("meta.json")) == meta
    except (zipfile.BadZipFile, KeyError, ValueError):
        return False
