"""How ``index.npz`` lies on a disk: columns of tiles, runs of slides and tars, and what is said of them; see
`data.shards.index`."""

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.files import appearing

COLUMNS = ("offset", "length", "x", "y")
RUNS = ("file_start", "run_start", "run_slide")
# Facts about each slide, one list each in ``meta["slides"]``. None where a shard of another program doesn't tell.
SLIDE_FACTS = ("slide", "source", "patient", "width", "height", "mpp_level0", "mpp", "tile_size", "tile_size_level0",
         "level", "downsample", "thumbnail_downsample", "tiles", "coordinates")  # fmt: skip


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


def places_in(raw: IO[bytes]) -> tuple[dict[str, Any], dict[str, tuple[np.dtype, int, int]]]:
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


def _write_column(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, rows: int, pieces: Iterable[np.ndarray]
) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(member, header)
        for piece in pieces:
            member.write(piece.astype(dtype).tobytes())
