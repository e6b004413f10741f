"""How ``index.npz`` lies on a disk: columns of tiles, runs of slides and tars, and what is said of them; see
`data.shards.index`."""

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.files import appearing
from data.npz_files import Place, place_of, write_column

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
            write_column(archive, name, dtypes[name], int(runs["file_start"][-1]), columns[name])
        for name in RUNS:
            write_column(archive, name, runs[name].dtype, len(runs[name]), [runs[name]])
        archive.writestr("meta.json", json.dumps(meta))


def places_in(raw: IO[bytes]) -> tuple[dict[str, Any], dict[str, Place]]:
    """``meta.json``, and where each column lies in the uncompressed npz."""
    with zipfile.ZipFile(raw) as archive:
        meta = json.loads(archive.read("meta.json"))
        return meta, {name: place_of(archive, raw, name) for name in (*COLUMNS, *RUNS)}
