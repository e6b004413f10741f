"""What cutting a slide into a shard costs over reading its tiles bare and encoding them: ``make bench-shard``.

Bare is a loop over the same tiles in row-major order: openslide's ``read_region``, ``convert("RGB")``, a resize where
the scale asks for it, simplejpeg. Ours is `write_shard`, all of it: order of reading, empty tiles, tar, JSON,
checksums, record, syncs. Both in this process, one thread, turn about, in CPU time; the least of each counts, since
other programs only ever add. Finding the tissue is a step of its own and is given beside it. ``over_bare`` is all of
it; ``over_bare_per_tile`` leaves out on both sides what the first tile costs (opening the slide; and ours coordinates,
record, syncs), which a whole slide of thousands of tiles pays once. With slides: ``python tests/bench/shard.py a.svs
b.svs``.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import simplejpeg
from PIL import Image

from data.shards.writing import PlannedShard, TileRange, write_shard
from data.slides.coordinates_h5 import write_tiling
from data.slides.cutting import JPEG_QUALITY
from data.slides.reading import Slide
from data.slides.tiling import READ, Tiling, TilingSettings, tile_slide
from data.slides.tissue import tissue_needed
from tests.data.slides.enormous_slide import write_enormous

ROUNDS = 9
MOST_TILES = 1248


def wide_slide(path: Path) -> Path:
    """40,000 × 2,560 pixels of texture in JPEG squares of 240 pixels, as scanners write them: a row of these is more
    than openslide's cache holds."""
    return write_enormous(path, 40_000, 2_560, (0, 0, 999, 999), mpp=0.5, square=240)


def bare(path: Path, tiling: Tiling, tiles: int) -> None:
    """Read and encode, and nothing else."""
    grid = tiling.grid
    side = int(np.ceil(grid.tile_size_level0 / grid.downsample - 1e-6))
    with openslide.OpenSlide(path) as slide:
        x, y, _ = tiling.tiles(*READ)
        for place in zip(x[:tiles].tolist(), y[:tiles].tolist(), strict=True):
            tile = slide.read_region(place, grid.level, (side, side)).convert("RGB")
            if grid.resampled:
                tile = tile.resize((grid.tile_size, grid.tile_size), Image.Resampling.BICUBIC)
            simplejpeg.encode_jpeg(np.asarray(tile), quality=JPEG_QUALITY)


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(path: Path, out: Path) -> dict[str, object]:
    """Milliseconds of CPU a tile, bare and ours, on one slide."""
    for folder in ("coordinates", "index"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    with Slide(path) as slide:
        tiling, _ = tile_slide(slide, "s", TilingSettings(0.5, 256, tissue_needed(["otsu"])), 0.5, "")
    survey = time.process_time() - started
    write_tiling(out, tiling)
    tiles = min(len(tiling.tiles(*READ)[0]), MOST_TILES)
    one, all_of_them = (PlannedShard("tiles-000000", [TileRange("s", 0, count)]) for count in (1, tiles))
    work = {
        "bare": lambda: bare(path, tiling, tiles),
        "ours": lambda: write_shard(out, all_of_them, {"s": str(path)}),
        "bare_first": lambda: bare(path, tiling, 1),
        "ours_first": lambda: write_shard(out, one, {"s": str(path)}),
    }
    least: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, step in work.items():
            least[name] = min(1e3 * seconds(step), least.get(name, float("inf")))
    more = (least["ours"] - least["ours_first"]) / (least["bare"] - least["bare_first"])
    return {
        "slide": path.name,
        "tiles": tiles,
        "bare_ms": round(least["bare"] / tiles, 3),
        "ours_ms": round(least["ours"] / tiles, 3),
        "over_bare": round(least["ours"] / least["bare"], 3),
        "over_bare_per_tile": round(more, 3),
        "first_tile_ms": [round(least["bare_first"], 2), round(least["ours_first"], 2)],
        "tissue_s": round(survey, 2),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        slides = [Path(name) for name in sys.argv[1:]] or [wide_slide(Path(folder) / "wide.tiff")]
        results = [measure(path, Path(folder) / path.stem) for path in slides]
    for result in results:
        print(result)
    worst = {name: max(float(str(result[name])) for result in results) for name in ("over_bare", "over_bare_per_tile")}
    print(json.dumps(worst | {"slides": results}))


if __name__ == "__main__":
    main()
