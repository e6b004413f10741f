"""What cutting a slide into a shard costs over reading its tiles bare and encoding them: ``make bench-shard``.

Bare is a loop over the same tiles in row-major order: openslide's ``read_region``, ``convert("RGB")``, a resize where the scale asks for it,
simplejpeg. Ours is `write_shard`, all of it: order of reading, empty tiles, tar, JSON, checksums, record, syncs. Both in this process, one thread,
turn about, in CPU time; the least of each counts, since other programs only ever add. Finding the tissue is a step of its own
and is given beside it. With slides: ``python tests/bench/shard.py a.svs b.svs``.
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

from data.coordinates_h5 import write_tiling
from data.cutting import JPEG_QUALITY
from data.shards import Part, Shard, write_shard
from data.slides import Slide
from data.tiling import READ, Tiling, TilingSettings, tile_slide
from tests.data.enormous_slide import write_enormous

ROUNDS = 5
MOST_TILES = 1248


def wide_slide(path: Path) -> Path:
    """40,000 × 2,560 pixels of texture in JPEG squares of 240 pixels, as scanners write them: a row of these is more than openslide's cache holds."""
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
        tiling, _ = tile_slide(slide, "s", TilingSettings(0.5, 256, "otsu", 0.25), 0.5, "")
    survey = time.process_time() - started
    write_tiling(out, tiling)
    tiles = min(len(tiling.tiles(*READ)[0]), MOST_TILES)
    shard = Shard("tiles-000000", [Part("s", 0, tiles)])
    pairs = [
        (seconds(lambda: bare(path, tiling, tiles)), seconds(lambda: write_shard(out, shard, {"s": str(path)})))
        for _ in range(ROUNDS)
    ]
    alone, ours = (1e3 * min(times) / tiles for times in zip(*pairs, strict=True))
    return {"slide": path.name, "tiles": tiles, "bare_ms": round(alone, 3), "ours_ms": round(ours, 3), "over_bare": round(ours / alone, 3), "tissue_s": round(survey, 2)}  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        slides = [Path(name) for name in sys.argv[1:]] or [wide_slide(Path(folder) / "wide.tiff")]
        results = [measure(path, Path(folder) / path.stem) for path in slides]
    for result in results:
        print(result)
    print(json.dumps({"over_bare": max(float(str(result["over_bare"])) for result in results), "slides": results}))


if __name__ == "__main__":
    main()
