"""Tiles read straight from the slides, at random places in their tissue (kaiko's online patching).

A tile number stands for a grid cell that has tissue. Each time it comes, the tile is read at another place around that
cell: shifted by up to half a tile either way, drawn with the key of the tile's position in the run. So every place in
the tissue is met, none is met again, and yet a pass covers all of it evenly, which places drawn one by one would not.

With `Scales` the tile's µm/px is drawn by the same key; cells are then those of the finest.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import open_files
from data.fault import Fault
from data.keyed import rng
from data.recently_made import RecentlyMade
from data.slides.coordinates import TileGrid, plan_grid
from data.slides.shared import SharedSlide
from data.slides.survey import Surveyed
from data.slides.tiling import KEPT, PEN, Tiling
from data.tiles.numbering import Numbering
from data.tiles.places import TilePlaces
from data.tiles.scales import Scales
from data.tiles.source import TileSource, UnreadableTile, cut_blocks
from data.tiles.stream import Part

TILES_PER_SLIDE_BLOCK = 100  # a slide is open anyway: shorter blocks mix more slides for the same windows
PLACE_TRIES = 10
PEN_ALLOWED = 0.15  # share of a tile that may lie in cells with pen
FEWEST_SLIDES_OPEN = 16  # slides of a process


class SlideTiles(TileSource):
    """The tissue of surveyed slides, as tiles of the survey's size and resolution. Blocks are of one slide each.

    ``shifted=False`` reads the grid cells themselves. With ``scales``, whose finest is the survey's resolution, each
    tile is of another. A slide gives at most ``most`` tiles a pass, spread over its tissue, each time at other cells.
    """

    def __init__(
        self,
        surveyed: Surveyed,
        group: int = 1,
        shifted: bool = True,
        scales: Scales | None = None,
        most: int | None = None,
    ) -> None:
        self.surveyed, self.shifted, self.scales, self.most = surveyed, shifted, scales, most
        counts = surveyed.tiles if most is None else [min(most, tiles) for tiles in surveyed.tiles]
        tiles = np.array(counts, dtype=np.int64)
        self.numbering = Numbering(counts)
        self.parts = [
            Part(cut_blocks(tiles, group, most=TILES_PER_SLIDE_BLOCK), name=f"the slides in {surveyed.folder}")
        ]
        more = "".join(f" {word}" for word in (scales, most) if word is not None)
        self.digest = f"{surveyed.digest}{more}"
        self._tilings = RecentlyMade(self._grid, FEWEST_SLIDES_OPEN)
        self._slides = RecentlyMade(self._opened, FEWEST_SLIDES_OPEN)

    def name(self, number: int) -> str:
        slide, cell = self.numbering.locate(number)
        return f"tile {cell} of {self.surveyed.files[slide]}"

    def slide(self, number: int) -> str:
        return str(self.surveyed.files[self.numbering.locate(number)[0]])

    def mpp(self, number: int, seed: int = 0, sample: int = 0) -> float:
        tiling, _ = self._tilings.get(self.numbering.locate(number)[0])
        return tiling.grid.mpp if self.scales is None else self._drawn(tiling.grid, self.scales, seed, sample)

    def places(self) -> Iterator[TilePlaces]:
        if self.most is not None:
            raise Fault(
                "data.tiles_per_slide draws a slide's tiles anew each time, and data.sample names them: leave one of the"
                " two null."
            )
        for number, slide in enumerate(self.surveyed.slides):
            tiling = self.surveyed.tiling(number)
            x, y, _ = tiling.tiles(KEPT)
            side = np.array([tiling.grid.tile_size_level0])
            yield TilePlaces([slide], np.zeros(len(x), dtype=np.int64), x, y, side)

    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        which, own = self.numbering.locate(number)
        try:
            tiling, cells = self._tilings.get(which)
            slide = self._slides.get(which)
        except Fault as error:  # the slide is gone: the tile as far into the next one
            following = (which + 1) % len(self.surveyed.slides)
            tile = self.numbering.number(following, own % self._tiles_of(following))
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})", int(tile)) from error
        cell = int(cells[self._kept(which, own, seed, sample)])
        try:
            grid = tiling.grid
            if self.scales is not None:
                mpp = self._drawn(grid, self.scales, seed, sample)
                size, name = grid.tile_size, str(slide.path)
                grid = plan_grid(slide.open().dimensions, grid.mpp_level0, mpp, size, name, exact=True)
            return slide.read_tile(grid, *self.place(tiling, cell, seed, sample, grid.tile_size_level0))
        except Fault as error:
            self._slides.drop(which)  # it may be gone altogether: then opening it for the next tile says so
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})", number + 1) from error

    def place(self, tiling: Tiling, cell: int, seed: int, sample: int, side: float | None = None) -> tuple[int, int]:
        """Level-0 ``(x, y)`` where a kept cell of a slide (``cell`` counts along its rows) is read for that sample, as a
        tile of ``side`` level-0 pixels (None: the grid's).

        A shifted tile has at least the survey's shares of tissue, by those of the cells it lies on, and next to no
        pen; where ten shifts don't find such a place it is the cell itself, in the tile's middle.
        """
        row, column = divmod(cell, tiling.verdict.shape[1])
        grid, step = tiling.grid, tiling.grid.tile_size_level0
        side = step if side is None else side
        around = (1 - side / step) / 2  # cells from the cell's corner to that of a tile around its middle
        if self.shifted:
            for down, right in rng(seed, "place", sample).uniform(-0.5, 0.5, (PLACE_TRIES, 2)).tolist():
                x = round(min(max(0.0, (column + right + around) * step), grid.width - side))
                y = round(min(max(0.0, (row + down + around) * step), grid.height - side))
                tissue, ink = _beneath(tiling, y / step, x / step, side / step)
                enough = (
                    has >= needed.share for has, needed in zip(tissue, self.surveyed.settings.tissue, strict=True)
                )
                if ink <= PEN_ALLOWED and all(enough):
                    return x, y
        if side == step:
            return int(grid.origin(column)), int(grid.origin(row))
        x, y = (round(max(0.0, (cell + around) * step)) for cell in (column, row))
        return min(x, int(grid.width - side)), min(y, int(grid.height - side))

    def _drawn(self, grid: TileGrid, scales: Scales, seed: int, sample: int) -> float:
        """µm/px of a sample: as fine as the slide is at the least, and no more than what makes it one tile."""
        whole = min(grid.width, grid.height) * grid.mpp_level0 / grid.tile_size
        return max(grid.mpp_level0, min(scales.draw(seed, sample), whole))

    def _tiles_of(self, slide: int) -> int:
        return int(self.numbering.starts[slide + 1] - self.numbering.starts[slide])

    def _kept(self, slide: int, own: int, seed: int, sample: int) -> int:
        """Which of a slide's kept cells its tile ``own`` is of: itself, or one of its share of them."""
        tiles, cells = self._tiles_of(slide), self.surveyed.tiles[slide]
        if tiles == cells:
            return own
        first, last = own * cells // tiles, (own + 1) * cells // tiles
        return int(rng(seed, "cell", sample).integers(first, last))

    def hold(self, blocks: int) -> None:
        self._slides.capacity = self._tilings.capacity = min(
            max(2 * blocks, FEWEST_SLIDES_OPEN), open_files.share_of_open_files(self)
        )

    def _grid(self, which: int) -> tuple[Tiling, np.ndarray]:
        """A slide's tiling and its kept cells."""
        tiling = self.surveyed.tiling(which)
        return tiling, np.flatnonzero(tiling.verdict == KEPT)

    def _opened(self, which: int) -> SharedSlide:
        slide = SharedSlide(Path(self.surveyed.files[which]))
        slide.open()
        return slide


def _beneath(tiling: Tiling, row: float, column: float, side: float = 1.0) -> tuple[list[float], float]:
    """Shares of tissue by each rule, and of cells with pen, under a tile at a fractional ``(row, column)`` of the grid,
    ``side`` cells wide."""
    (rows, down), (columns, right) = (
        _overlaps(start, side, count) for start, count in zip((row, column), tiling.verdict.shape, strict=True)
    )
    tissue = [float(down @ shares[rows, columns] @ right) for shares in (tiling.tissue, *tiling.further)]
    return tissue, float(down @ (tiling.verdict[rows, columns] == PEN) @ right)


def _overlaps(start: float, side: float, cells: int) -> tuple[slice, np.ndarray]:
    """The cells along one axis that a tile from ``start`` on lies on, and its share on each."""
    first, last = int(start), min(int(np.ceil(start + side)), cells)
    edges = np.arange(first, last)
    return slice(first, last), (np.minimum(edges + 1, start + side) - np.maximum(edges, start)) / side
