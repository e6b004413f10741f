"""Where a tile lies: level-0 pixels, grid cells, microns and delivered pixels, and the ways between them.

Every number about a tile's place is made here. A tile is ``(x, y)``: its top-left corner in level-0 pixels, int64. It
covers ``tile_size_level0`` level-0 pixels (a float, exact) a side, and is delivered as ``tile_size`` pixels of ``mpp``
microns, so that

    tile_size_level0 · mpp_level0 = tile_size · mpp

Its cell in the slide's grid is ``floor(x / tile_size_level0), floor(y / tile_size_level0)``, as (column, row).
Row-major order, the order of every list of tiles, is by ``(y, x)``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.fault import Fault

# A level this close to the asked scale is delivered as it is. Scanners say 0.499 or 0.2527 where 0.5 and 0.25 are
# meant, and resampling 256.5 pixels to 256 would blur every tile to correct the scale by less than a stain varies.
SAME_SCALE = 0.02
UNKNOWN_PLACE = -1  # x and y of a tile whose place on a slide nobody recorded
FARTHEST = 2**31  # level-0 pixels, which no slide has: x and y are int32 where many are kept


@dataclass(frozen=True)
class TileGrid:
    """The grid that cuts one slide into whole, non-overlapping tiles, and the pyramid level they are read from.

    A remainder narrower than a tile at the right and the bottom is left out: no tile has padding in it.
    """

    width: int  # level-0 pixels
    height: int
    mpp_level0: float  # microns per level-0 pixel
    tile_size: int  # delivered pixels a side
    mpp: float  # microns per delivered pixel: the true value, which may differ from the asked one by up to 2 %
    tile_size_level0: float
    level: int
    downsample: float  # level-0 pixels per pixel of that level

    @property
    def columns(self) -> int:
        return int(self.width / self.tile_size_level0)

    @property
    def rows(self) -> int:
        return int(self.height / self.tile_size_level0)

    @property
    def resampled(self) -> bool:
        """False where the level's pixels are delivered untouched."""
        return self.tile_size_level0 != self.tile_size * self.downsample

    def origin(self, cell: np.ndarray | int) -> np.ndarray:
        """Cell index along one axis → x (or y) of its tile, int64: the first level-0 pixel that lies in the cell."""
        return cell_origin(cell, self.tile_size_level0)

    def cell(self, x: np.ndarray | int) -> np.ndarray:
        """x (or y) in level-0 pixels → index of the cell that holds it, int64."""
        return cell_of(x, self.tile_size_level0)

    def microns(self, x: np.ndarray | float) -> np.ndarray:
        """Level-0 pixels → microns from the slide's top-left corner, float64."""
        return np.asarray(x, dtype=np.float64) * self.mpp_level0

    def level0(self, microns: np.ndarray | float) -> np.ndarray:
        """Microns → level-0 pixels, float64 (round to get back the integers that `microns` was given)."""
        return np.asarray(microns, dtype=np.float64) / self.mpp_level0

    def level_box(self, x: int, y: int) -> tuple[float, float, float]:
        """Left, top and side, in pixels of the level that is read, of the tile at level-0 ``(x, y)``.

        Left and top are moved by less than one level-0 pixel where the box would hang over the slide's edge (a corner
        is rounded up to a whole pixel, its far edge is not), and to whole pixels where nothing is resampled.
        """
        left = max(0.0, min(float(x), self.width - self.tile_size_level0)) / self.downsample
        top = max(0.0, min(float(y), self.height - self.tile_size_level0)) / self.downsample
        if not self.resampled:
            return float(round(left)), float(round(top)), float(self.tile_size)
        return left, top, self.tile_size_level0 / self.downsample


def cell_origin(cell: np.ndarray | int, tile_size_level0: float) -> np.ndarray:
    """The smallest integer x with ``cell_of(x) == cell``: ``ceil(cell · tile_size_level0)``, safe against rounding."""
    index = np.asarray(cell, dtype=np.int64)
    # From below: a product that is rounded up past a whole number (650 · 1.1 > 715) doesn't leave that number out.
    x = np.floor(index * tile_size_level0).astype(np.int64)
    return x + (cell_of(x, tile_size_level0) < index)


def cell_of(x: np.ndarray | int, tile_size_level0: float) -> np.ndarray:
    """``floor(x / tile_size_level0)``, int64, for coordinates along one axis."""
    return np.floor(np.asarray(x, dtype=np.int64) / tile_size_level0).astype(np.int64)


def row_major(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The permutation that sorts tiles by (y, x), the order of every list of tiles."""
    return np.lexsort((x, y))


def exact_downsamples(dimensions: Sequence[tuple[int, int]]) -> list[float]:
    """Downsample of each pyramid level from the levels' (width, height) in pixels.

    Levels have whole numbers of pixels, so the ratio of widths is off by the rounding: 4443 / 2221 = 2.0005 for a level
    made by halving. Where a whole number explains both sides to within a pixel, it is that number, otherwise the mean
    of the two ratios as it stands.
    """
    width, height = dimensions[0]
    downsamples = []
    for level_width, level_height in dimensions:
        ratio = (width / level_width + height / level_height) / 2
        whole = round(ratio)
        explained = abs(width / whole - level_width) <= 1 and abs(height / whole - level_height) <= 1
        downsamples.append(float(whole) if explained else ratio)
    return downsamples


def plan_grid(
    dimensions: Sequence[tuple[int, int]], mpp_level0: float, mpp: float, tile_size: int, name: str, exact: bool = False
) -> TileGrid:
    """Choose the pyramid level and lay the grid for tiles of ``tile_size`` pixels at ``mpp`` microns per pixel.

    The level is the coarsest one that is no coarser than asked, within 2 %. If it is within 2 % of the asked scale its
    pixels are delivered one to one: ``tile_size_level0`` is exactly ``tile_size × downsample`` and the grid's ``mpp``
    is the level's own. Otherwise tiles are shrunk from it: ``mpp`` is exactly what was asked and ``tile_size_level0``
    is in general not whole.

    ``exact`` takes no scale for another that is within 2 % of it, and delivers what was asked.

    ``dimensions`` are the (width, height) of each level, ``name`` is for messages. Raises Fault where the slide has no
    level that fine (tiles are never enlarged).
    """
    downsamples, same = exact_downsamples(dimensions), 0.0 if exact else SAME_SCALE
    fine_enough = [i for i, d in enumerate(downsamples) if mpp_level0 * d <= mpp * (1 + same)]
    if not fine_enough:
        raise Fault(
            f"{name} has {mpp_level0:.4g} µm per pixel, coarser than the asked {mpp:.4g}, and tiles are never enlarged:"
            f" ask for mpp={math.ceil(mpp_level0 * 100) / 100:g} or more, or leave this slide out"
        )
    level = max(fine_enough, key=lambda i: downsamples[i])
    downsample = downsamples[level]
    level_mpp = mpp_level0 * downsample
    width, height = dimensions[0]
    if abs(level_mpp / mpp - 1) <= same:
        return TileGrid(width, height, mpp_level0, tile_size, level_mpp, tile_size * downsample, level, downsample)
    return TileGrid(width, height, mpp_level0, tile_size, mpp, tile_size * mpp / mpp_level0, level, downsample)
