"""The order of tiles: a pure function of (seed, position).

    blocks    ▓▓▓▓ ▓▓▓▓ ▓▓▓▓ ▓▓▓▓ ▓▓▓▓        runs of about a thousand neighbouring tiles of the source
    pass      a permutation of all blocks, laid end to end: T tiles
    lanes     └─ 0 ─┘└─ 1 ─┘└─ 2 ─┘└─ 3 ─┘    the pass cut into equal stretches (to within one tile)
    window    inside its stretch a lane permutes the tiles of a few blocks at a time
    batch     the same number of tiles from every lane, lane after lane

A lane reads its stretch from front to back, then its stretch of the next pass, for ever. Because every pass cuts the
same T tiles into the same lengths, the tile at position ``n`` of a lane is found by one division, wherever in the run
it lies: there is no state but the position. Ranks own neighbouring lanes, so a rank's share of a global batch is a
contiguous slice of it, and a change of world size changes who reads a tile, never which tile is read.

Within a pass of a lane every tile comes once; over all lanes a pass holds every tile of the source exactly once.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from data.fault import Fault
from data.keyed import rng


@dataclass(frozen=True)
class Window:
    """A few neighbouring blocks of one lane's pass, their tiles permuted."""

    start: int  # position in the lane's pass of its first tile
    tiles: np.ndarray  # (n,) int64: tile numbers, in the order in which they come


class Stream:
    """Global batches of tile numbers ``0 … T − 1`` for a source made of blocks of the given sizes.

    ``lanes`` bounds the world size (a rank owns at least one lane) and is part of the order, as ``batch_size``,
    ``window`` (blocks that are mixed) and ``seed`` are: change one and the order is another.
    Raises Fault where the numbers don't divide.
    """

    def __init__(self, block_sizes: np.ndarray, *, batch_size: int, lanes: int, window: int, seed: int) -> None:
        self.sizes = np.asarray(block_sizes, dtype=np.int64)
        self.tiles = int(self.sizes.sum())
        self.batch_size, self.lanes, self.window, self.seed = batch_size, lanes, window, seed
        if batch_size % lanes:
            raise Fault(
                f"data.batch_size={batch_size} is not a multiple of data.lanes={lanes}: a batch takes the same number from every lane."
            )
        if self.tiles < lanes:
            raise Fault(f"the source holds {self.tiles} tiles, fewer than data.lanes={lanes}; set data.lanes lower.")
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])  # each block's first tile number
        self._passes: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: dict[int, tuple[int, Window]] = {}

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Tile numbers ``(batch_size / world_size,)`` of a rank's share of global batch ``step`` (both count from 0)."""
        if self.lanes % world_size:
            raise Fault(
                f"data.lanes={self.lanes} is not a multiple of the {world_size} processes; set data.lanes to a multiple of it."
            )
        owned = self.lanes // world_size
        each = self.batch_size // self.lanes
        return np.concatenate([self.lane(lane, step * each, each) for lane in range(rank * owned, (rank + 1) * owned)])

    def lane(self, lane: int, position: int, count: int) -> np.ndarray:
        """``count`` tile numbers of ``lane`` from its ``position`` on (tiles consumed so far)."""
        first, last = self._stretch(lane)
        found = []
        while count:
            number, offset = divmod(position, last - first)
            window = self._window(lane, number, offset)
            part = window.tiles[offset - window.start :][:count]
            found.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(found)

    def _stretch(self, lane: int) -> tuple[int, int]:
        """The tiles ``[first, last)`` of every pass that are this lane's."""
        return lane * self.tiles // self.lanes, (lane + 1) * self.tiles // self.lanes

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A pass's permuted blocks and where each ends in the pass: ``(blocks,)`` twice."""
        if number not in self._passes:
            order = rng(self.seed, "blocks", number).permutation(len(self.sizes))
            self._passes[number] = order, np.cumsum(self.sizes[order])
            if len(self._passes) > 2:  # lanes differ by a tile a pass, so at most two passes are open at once
                self._passes.popitem(last=False)
        return self._passes[number]

    def _window(self, lane: int, number: int, offset: int) -> Window:
        """The window of this lane's pass ``number`` that holds ``offset``; the last one of each lane is kept."""
        cached = self._windows.get(lane)
        if cached and cached[0] == number and 0 <= offset - cached[1].start < len(cached[1].tiles):
            return cached[1]
        order, ends = self._pass(number)
        first, last = self._stretch(lane)
        first_block = int(np.searchsorted(ends, first, side="right"))
        here = int(np.searchsorted(ends, first + offset, side="right"))
        index = (here - first_block) // self.window
        low = first_block + index * self.window
        pieces, start = [], None
        for at in range(low, min(low + self.window, len(order))):
            block = order[at]
            begin, end = int(ends[at] - self.sizes[block]), int(ends[at])
            cut_begin, cut_end = max(begin, first), min(end, last)  # a stretch may begin or end inside a block
            if cut_begin >= cut_end:
                continue
            start = cut_begin - first if start is None else start
            pieces.append(np.arange(cut_begin - begin, cut_end - begin) + self.starts[block])
        tiles = np.concatenate(pieces)
        assert start is not None
        window = Window(start, rng(self.seed, "window", number, lane, index).permutation(tiles))
        self._windows[lane] = number, window
        return window
