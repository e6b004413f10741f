"""A slide's tiles as JPEGs, in an order of reading that decodes each piece of the slide about once.

A slide is stored in compressed squares of its own, which tiles share at their edges. Read row by row over a wide slide,
a square has left openslide's cache before the row below asks for it, and is decoded twice. So tiles are read square
field by square field, each field small enough for the cache, and handed on in row-major order all the same: what waits
for its turn is a band of JPEGs, never pixels. Memory is bounded by the cache and one such band, whatever the slide's
size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from data.fault import Fault
from data.slides.reading import Slide
from data.slides.tiling import DAMAGED, KEPT, READ, Tiling, verdict_of

JPEG_QUALITY = 90
MOST_DAMAGED = 0.05  # share of a slide's tiles that may be damaged before the slide counts as failed
FIELD = 2048  # pixels a side, of the level that is read, of a field of tiles that are read one after another
CACHE = (
    64 << 20
)  # bytes of decoded pixels: a field, and the slide's own squares (up to 1024 pixels) that stick out of it


@dataclass(frozen=True)
class CutTile:
    """A tile at level-0 ``(x, y)``: its share of tissue and its JPEG, or a ``verdict`` other than KEPT and no JPEG."""

    x: int
    y: int
    share: float
    verdict: int
    jpeg: bytes


def cut_tiles(
    source: Path, tiling: Tiling, first: int, last: int, min_saturated: float | None = None
) -> Iterator[CutTile]:
    """Cut candidates ``first … last − 1`` of the tiling from the slide ``source``, in row-major order, reading each
    once; what its pixels say of one is `verdict_of` it.

    Raises Fault where the slide can't be opened, isn't the one that was tiled, or more than 5 % of these tiles are
    damaged.
    """
    grid = tiling.grid
    x, y, share = (values[first:last] for values in tiling.tiles(*READ))
    level_side = grid.tile_size_level0 / grid.downsample
    field = max(1, int(FIELD / level_side)) * grid.tile_size_level0
    band = (y / field).astype(np.int64)
    order = np.lexsort((x, y, (x / field).astype(np.int64), band))
    most_damaged, damaged = MOST_DAMAGED * len(x), 0
    slide = Slide(source, CACHE)
    try:
        if slide.dimensions[0] != (grid.width, grid.height):
            raise Fault(
                f"{source} is not the slide it was when its tissue was found (its size has changed): shard it into"
                " another folder"
            )
        waiting: dict[int, CutTile] = {}
        following = 0  # row-major number of the tile that is handed on next
        for number in order.tolist():
            place = int(x[number]), int(y[number]), float(share[number])
            try:
                tile = slide.tile_pixels(grid, place[0], place[1])
            except Fault as fault:
                damaged += 1
                if damaged > most_damaged:
                    raise Fault(
                        f"{fault}; {damaged} of its tiles so far, too many to go on: replace the file"
                    ) from fault
                waiting[number] = CutTile(*place, DAMAGED, b"")
                slide.close()
                slide = Slide(source, CACHE)  # after an error openslide refuses everything else on the same handle
            else:
                verdict = verdict_of(tile, min_saturated)
                waiting[number] = CutTile(*place, verdict, encode(tile) if verdict == KEPT else b"")
            while following in waiting:
                yield waiting.pop(following)
                following += 1
    finally:
        slide.close()


def encode(tile: np.ndarray) -> bytes:
    """The JPEG of a tile, uint8 RGB (H, W, 3), or (H, W, 4) as `Slide.tile_pixels` gives it."""
    return simplejpeg.encode_jpeg(tile, quality=JPEG_QUALITY, colorspace="BGRX" if tile.shape[2] == 4 else "RGB")
