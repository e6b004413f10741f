"""Tiles read straight from the slides, at random places in their tissue (kaiko's online patching).

A tile number stands for a grid cell that has tissue. Each time it comes, the tile is read at another place around that
cell: shifted by up to half a tile either way, drawn with the key of the tile's position in the run. So every place in
the tissue is met, none is met again, and yet a pass covers all of it evenly, which places drawn one by one would not.
"""

from pathlib import Path

import numpy as np

from data import open_files
from data.fault import Fault
from data.keyed import rng
from data.recently_made import RecentlyMade
from data.slides.shared import SharedSlide
from data.slides.survey import Surveyed
from data.slides.tiling import KEPT, PEN, Tiling
from data.tiles.numbering import Numbering
from data.tiles.source import TileSource, UnreadableTile, cut_blocks
from data.tiles.stream import Part

TILES_PER_SLIDE_BLOCK = 100  # a slide is open anyway: shorter blocks mix more slides for the same windows
PLACE_TRIES = 10
PEN_ALLOWED = 0.15  # share of a tile that may lie in cells with pen
FEWEST_SLIDES_OPEN = 16  # slides of a process


class SlideTiles(TileSource):
    """The tissue of surveyed slides, as tiles of the survey's size and resolution. Blocks are of one slide each.

    ``shifted=False`` reads the grid cells themselves.
    """

    def __init__(self, surveyed: Surveyed, group: int = 1, shifted: bool = True) -> None:
        self.surveyed, self.shifted = surveyed, shifted
        tiles = np.array(surveyed.tiles, dtype=np.int64)
        self.numbering = Numbering(surveyed.tiles)
        self.parts = [
            Part(cut_blocks(tiles, group, most=TILES_PER_SLIDE_BLOCK), name=f"the slides in {surveyed.folder}")
        ]
        self.digest = surveyed.digest
        self._tilings = RecentlyMade(self._grid, FEWEST_SLIDES_OPEN)
        self._slides = RecentlyMade(self._opened, FEWEST_SLIDES_OPEN)

    def name(self, number: int) -> str:
        slide, cell = self.numbering.locate(number)
        return f"tile {cell} of {self.surveyed.files[slide]}"

    def slide(self, number: int) -> str:
        return str(self.surveyed.files[self.numbering.locate(number)[0]])

    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        which, cell = self.numbering.locate(number)  # of the slide's kept cells
        try:
            tiling, cells = self._tilings.get(which)
            slide = self._slides.get(which)
        except Fault as error:  # the slide is gone: the tile as far into the next one
            following = (which + 1) % len(self.surveyed.slides)
            tile = self.numbering.number(following, cell % self.surveyed.tiles[following])
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})", int(tile)) from error
        x, y = self.place(tiling, int(cells[cell]), seed, sample)
        try:
            return slide.read_tile(tiling.grid, x, y)
        except Fault as error:
            self._slides.drop(which)  # it may be gone altogether: then opening it for the next tile says so
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})", number + 1) from error

    def place(self, tiling: Tiling, cell: int, seed: int, sample: int) -> tuple[int, int]:
        """Level-0 ``(x, y)`` where a kept cell of a slide (``cell`` counts along its rows) is read for that sample.

        A shifted tile has at least the survey's share of tissue, by the shares of the four cells it lies on, and next
        to no pen; where ten shifts don't find such a place it is the cell itself.
        """
        row, column = divmod(cell, tiling.verdict.shape[1])
        grid = tiling.grid
        if self.shifted:
            side = grid.tile_size_level0
            for down, right in rng(seed, "place", sample).uniform(-0.5, 0.5, (PLACE_TRIES, 2)).tolist():
                x = round(min(max(0.0, (column + right) * side), grid.width - side))
                y = round(min(max(0.0, (row + down) * side), grid.height - side))
                tissue, ink = _beneath(tiling, y / side, x / side)
                if tissue >= self.surveyed.settings.min_tissue and ink <= PEN_ALLOWED:
                    return x, y
        return int(grid.origin(column)), int(grid.origin(row))

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


def _beneath(tiling: Tiling, row: float, column: float) -> tuple[float, float]:
    """Shares of tissue, and of cells with pen, under a tile at a fractional ``(row, column)`` of the grid."""
    rows, columns = tiling.verdict.shape
    tissue = ink = 0.0
    for r, down in ((int(row), 1 - row % 1), (int(row) + 1, row % 1)):
        for c, right in ((int(column), 1 - column % 1), (int(column) + 1, column % 1)):
            if r < rows and c < columns:
                tissue += down * right * float(tiling.tissue[r, c])
                ink += down * right * float(tiling.verdict[r, c] == PEN)
    return tissue, ink
