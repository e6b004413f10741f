"""The plan at the size of the largest published pretraining: 1,384,860,229 tiles of 171,189 slides, 256 processes.

    python tests/bench/plan.py [folder]

Writes an index of that size (some 20 GB, removed at the end) with shards of no bytes beside it. Then, in a process of
its own: opens the index, plans the stream, and finds positions from the first step to the billionth, as a resumed rank
does. Ends with one JSON line: ``plan_seconds`` (index to stream), ``find_position_seconds`` (the slowest of the
positions, its tiles' places in the tars included), ``peak_gib`` (of that process, the interpreter and its libraries
included) and ``index_bytes_per_tile``.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.keyed import rng
from data.shards.layout import SLIDE_FACTS, write_shard_index
from data.tiles.of_shards import ShardTiles
from data.tiles.stream import Stream

TILES, SLIDES, SHARDS = 1_384_860_229, 171_189, 170_000
RANKS, LANES, BATCH, WINDOW = 256, 256, 4096, 4
STEPS = (0, 1, 12_345, 338_100, 338_101, 10**6, 10**9)  # 338,100 is where the first pass ends


def generate(folder: Path) -> None:
    """A folder as `pretrain shard` leaves it, but for the bytes of the tiles."""
    cuts = np.sort(rng(0, "plan", "slides").choice(TILES - 1, SLIDES - 1, replace=False)) + 1
    per_slide = np.diff(np.concatenate([[0], cuts, [TILES]]))
    file_start = np.arange(SHARDS + 1, dtype=np.int64) * TILES // SHARDS
    run_start = np.union1d(file_start, np.concatenate([[0], np.cumsum(per_slide)]))
    run_slide = np.searchsorted(np.cumsum(per_slide), run_start[:-1], side="right").astype(np.int32)
    files = [f"tiles-{number:06d}.tar" for number in range(SHARDS)]
    for name in files:
        (folder / name).touch()
    names = [f"TCGA-XX-{number:06d}-01Z-00-DX1" for number in range(SLIDES)]
    values = {
        "slide": names,
        "source": [f"/archive/slides/batch-{number % 97:02d}/{name}.svs" for number, name in enumerate(names)],
        "patient": [name[:14] for name in names],
        "width": [98_304] * SLIDES,
        "height": [81_920] * SLIDES,
        "mpp_level0": [0.2527] * SLIDES,
        "mpp": [0.5] * SLIDES,
        "tile_size": [256] * SLIDES,
        "tile_size_level0": [506.529] * SLIDES,
        "level": [0] * SLIDES,
        "downsample": [1.0] * SLIDES,
        "thumbnail_downsample": [96.0] * SLIDES,
        "tiles": per_slide.tolist(),
        "coordinates": [f"coordinates/{name}_patches.h5" for name in names],
    }
    assert set(values) == set(SLIDE_FACTS)
    meta = {
        "mpp": 0.5,
        "tile_size": 256,
        "files": files,
        "sizes": [140_000_000] * SHARDS,
        "digest": "0" * 32,
        "slides": values,
    }
    counts = np.diff(file_start)
    dtypes = {
        "offset": np.dtype(np.uint32),
        "length": np.dtype(np.uint16),
        "x": np.dtype(np.int32),
        "y": np.dtype(np.int32),
    }
    most = int(counts.max())
    lengths = rng(0, "plan", "lengths").integers(9_000, 26_000, most)
    offsets = 512 + np.cumsum(np.concatenate([[0], (lengths[:-1] + 511) // 512 * 512 + 1536]))
    places = {"offset": offsets, "length": lengths, "x": np.arange(most) % 190 * 507, "y": np.arange(most) // 190 * 507}

    def column(values: np.ndarray, name: str) -> Iterator[np.ndarray]:
        values = values.astype(dtypes[name])
        return (values[:count] for count in counts.tolist())

    runs = {"file_start": file_start, "run_start": run_start, "run_slide": run_slide}
    write_shard_index(folder, meta, dtypes, {name: column(values, name) for name, values in places.items()}, runs)


def measure(folder: Path) -> dict[str, float]:
    """Plan and find, in this process."""
    began = time.perf_counter()
    tiles = ShardTiles(shards=[folder])
    stream = Stream(tiles.parts, batch_size=BATCH, lanes=LANES, window=WINDOW, seed=0)
    planned = time.perf_counter() - began
    assert stream.tiles == TILES == len(tiles)
    slowest = 0.0
    for rank, step in enumerate(STEPS):
        resumed = Stream(tiles.parts, batch_size=BATCH, lanes=LANES, window=WINDOW, seed=0)
        began = time.perf_counter()
        numbers = resumed.batch(step, rank * 31 % RANKS, RANKS)
        for number in numbers.tolist():
            index, row = tiles.locate(number)
            assert index.length[row] >= 9_000 and index.offset[row] >= 512
        slowest = max(slowest, time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"plan_seconds": planned, "find_position_seconds": slowest, "peak_gib": peak}


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
        return
    folder = Path(sys.argv[1]) if sys.argv[1:] else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="plan-") as name:
        folder = Path(name)
        print(f"writing an index of {TILES:,} tiles into {folder} …", flush=True)
        generate(folder)
        size = (folder / "index.npz").stat().st_size
        print(f"index.npz: {size / 1e9:.2f} GB; planning for {RANKS} processes …", flush=True)
        done = subprocess.run(
            [sys.executable, __file__, "measure", name], stdout=subprocess.PIPE, text=True, check=True
        )
        figures = json.loads(done.stdout)
    figures["index_bytes_per_tile"] = size / TILES
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
