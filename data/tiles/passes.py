"""Pass after pass over one source, for every lane: a pure function of (seed, position in the lane).

    blocks    ▓▓▓▓ ▓▓▓▓ ▓▓▓▓ ▓▓▓▓ ▓▓▓▓        runs of about a thousand neighbouring tiles of the source
    pass      a permutation of all blocks, laid end to end: T tiles
    lanes     └─ 0 ─┘└─ 1 ─┘└─ 2 ─┘└─ 3 ─┘    the pass cut into equal stretches (to within one tile)
    window    inside its stretch a lane mixes the tiles of a few blocks at a time

A lane reads its stretch from front to back, then its stretch of the next pass, for ever. Because every pass cuts the
same T tiles into the same lengths, the tile at position ``n`` of a lane is found by one division, wherever in the run
it lies: there is no state but the position. Within a pass of a lane every tile comes once; over all lanes a pass
holds every tile of the source exactly once.
"""

from dataclasses import dataclass

import numpy as np

from data.keyed import rng
from data.recently_made import RecentlyMade


@dataclass(frozen=True)
class Window:
    """A few neighbouring blocks of one lane's pass, their tiles mixed."""

    number: int  # of the pass
    start: int  # position in the lane's pass of its first tile
    tiles: np.ndarray  # (n,) int64: tile numbers, in the order in which they come

    def holds(self, number: int, offset: int) -> bool:
        return self.number == number and 0 <= offset - self.start < len(self.tiles)


class Passes:
    """The order of tiles ``first … first + T − 1`` of a source made of blocks of ``block_sizes`` ``(blocks,)`` tiles.

    With ``group`` above 1 a window's tiles come in groups of that many from one block, the groups mixed: positions
    ``[i·group, (i+1)·group)`` of a lane hold tiles of one block, whatever pass and window. What of a block fills no
    group makes groups with what is left of the window's other blocks, so that still every tile comes once.
    ``key`` and ``seed`` make orders independent of each other.
    """

    def __init__(
        self, block_sizes: np.ndarray, *, lanes: int, window: int, group: int, seed: int, key: int, first: int
    ) -> None:
        self.sizes = np.asarray(block_sizes, dtype=np.int64)
        self.tiles, self.first = int(self.sizes.sum()), first
        self.starts = np.cumsum(self.sizes) - self.sizes + first  # each block's first tile number
        self.lanes, self.window, self.group, self.seed, self.key = lanes, window, group, seed, key
        self._passes = RecentlyMade(self._pass, 2)  # lanes differ by a tile a pass: no more are open at once
        self._windows: dict[int, Window] = {}

    def tile_numbers(self, lane: int, position: int, count: int) -> np.ndarray:
        """``count`` tile numbers of ``lane``, int64, from its ``position`` on (tiles that it took before)."""
        first, last = self._stretch(lane)
        found = []
        while count:
            number, offset = divmod(position, last - first)
            window = self._windows.get(lane)
            if window is None or not window.holds(number, offset):
                window = self._windows[lane] = self._mix(lane, number, offset)
            part = window.tiles[offset - window.start :][:count]
            found.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _stretch(self, lane: int) -> tuple[int, int]:
        """The tiles ``[first, last)`` of every pass that are this lane's."""
        return lane * self.tiles // self.lanes, (lane + 1) * self.tiles // self.lanes

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A pass's permuted blocks and where each ends in the pass: ``(blocks,)`` twice."""
        order = rng(self.seed, "blocks", self.key, number).permutation(len(self.sizes))
        return order, np.cumsum(self.sizes[order])

    def _mix(self, lane: int, number: int, offset: int) -> Window:
        """The window of this lane's pass ``number`` that holds ``offset``."""
        order, ends = self._passes.get(number)
        first, last = self._stretch(lane)
        first_block = int(np.searchsorted(ends, first, side="right"))
        here = int(np.searchsorted(ends, first + offset, side="right"))
        index = (here - first_block) // self.window
        low = first_block + index * self.window
        pieces, start = [], last - first
        for at in range(low, min(low + self.window, len(order))):
            block = order[at]
            begin, end = int(ends[at] - self.sizes[block]), int(ends[at])
            cut_begin, cut_end = max(begin, first), min(end, last)  # a stretch may begin or end inside a block
            if cut_begin < cut_end:
                start = min(start, cut_begin - first)
                pieces.append(np.arange(cut_begin - begin, cut_end - begin) + self.starts[block])
        draw = rng(self.seed, "window", self.key, number, lane, index)
        if self.group == 1:
            return Window(number, start, draw.permutation(np.concatenate(pieces)))
        return Window(number, start, self._grouped(pieces, number * (last - first) + start, draw))

    def _grouped(self, pieces: list[np.ndarray], position: int, draw: np.random.Generator) -> np.ndarray:
        """The tiles of ``pieces`` in groups of one piece each, aligned for a window that begins at the lane's
        ``position``."""
        groups, left_over = [], []
        for piece in map(draw.permutation, pieces):
            whole = len(piece) // self.group * self.group
            groups += list(piece[:whole].reshape(-1, self.group))
            left_over.append(piece[whole:])
        groups = [groups[i] for i in draw.permutation(len(groups))]
        behind = -position % self.group  # what the group that the window before began still lacks
        while groups and sum(map(len, left_over)) < behind:
            left_over.append(groups.pop())
        rest = draw.permutation(np.concatenate(left_over))
        return np.concatenate([rest[:behind], *groups, rest[behind:]])
