"""Which sequences make up a global batch: a pure function of (seed, step), for any number of processes.

    stream   ▓▓ ▓▓▓▓▓ ▓ ▓▓▓ ▓▓ ▓▓▓▓ …       sequences of any lengths; every pass is a keyed permutation, laid end to end
    lanes    └─ 0 ──┘└ 1 ─┘└─ 2 ─┘└ 3        in turn each takes what follows, until its share of tiles or sequences is full
    batch    └────────────────────┘          a round of all lanes

A rank owns neighbouring lanes, so a change of world size changes who reads a sequence, never which are in a batch, and
what a rank holds at once is bounded by the lanes that it owns. A sequence larger than a lane's share goes alone.
Nothing is padded, so a lane that isn't full costs nothing.
"""

from dataclasses import dataclass

import numpy as np

from data.fault import Fault
from data.keyed import rng
from data.recently_made import RecentlyMade


class Packing:
    """Global batches of positions for sequences of ``sizes`` (n,) tiles.

    batch_size, batch_tokens: most sequences and most tiles in a global batch (batch_tokens None: any number), a lane's
    share of either being a ``lanes``-th. Raises Fault where the numbers don't divide.
    """

    def __init__(self, sizes: np.ndarray, *, batch_size: int, batch_tokens: int | None, lanes: int, seed: int) -> None:
        if batch_size % lanes:
            raise Fault(
                f"data.batch_size={batch_size} is not a multiple of data.lanes={lanes}: lanes take the same number."
            )
        if batch_tokens is not None and batch_tokens < lanes:
            raise Fault(f"data.batch_tokens={batch_tokens} leaves less than a tile for each of data.lanes={lanes}.")
        self.sizes, self.lanes, self.seed = np.asarray(sizes, np.int64), lanes, seed
        self.most = batch_size // lanes
        self.room = None if batch_tokens is None else batch_tokens // lanes
        self._starts = [0]  # the position at which each global batch begins, as far as it was asked for
        self._passes = RecentlyMade(self._pass, 2)

    def sequence_at(self, position: int) -> int:
        """The sequence at a position of the stream: ``position // n`` is its pass, each pass holds each sequence
        once."""
        number, offset = divmod(position, len(self.sizes))
        return int(self._passes.get(number).order[offset])

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> range:
        """The positions of a rank's share of global batch ``step`` (both count from 0). Fault unless the lanes divide.

        With ``a`` micro-batches a step, micro-batch ``i`` of a rank is ``batch(step, rank * a + i, world_size * a)``.
        """
        if self.lanes % world_size:
            raise Fault(
                f"data.lanes={self.lanes} can't be shared evenly by {world_size} processes or micro-batches; make it a"
                " multiple."
            )
        owned = self.lanes // world_size
        first = self._after(self.start(step), rank * owned)
        return range(first, self._after(first, owned))

    def start(self, step: int) -> int:
        """The position at which global batch ``step`` begins. A later step than ever asked for is found by packing up
        to it: a second for the twenty thousand steps of a published run."""
        if self.room is None:
            return step * self.most * self.lanes
        while len(self._starts) <= step:
            self._starts.append(self._after(self._starts[-1], self.lanes))
        return self._starts[step]

    def _after(self, position: int, lanes: int) -> int:
        """The position after so many lanes that begin at ``position``."""
        if self.room is None:
            return position + lanes * self.most
        while lanes:
            number, offset = divmod(position, len(self.sizes))
            fills = self._passes.get(number).fills
            while lanes and (end := fills[offset]) is not None:
                offset = end
                lanes -= 1
            position = number * len(self.sizes) + offset
            if lanes:  # this lane goes on into the next pass
                position = self._fill(position, self.room)
                lanes -= 1
        return position

    def _fill(self, position: int, room: int) -> int:
        """The position after one lane that begins at ``position``: as many sequences as fit into ``room`` tiles, at
        least one."""
        taken = 0
        while True:
            number, offset = divmod(position + taken, len(self.sizes))
            ends = self._passes.get(number).ends
            fits = int(np.searchsorted(ends, ends[offset] + room, side="right")) - 1
            last = max(min(fits, offset + self.most - taken), offset if taken else offset + 1)
            room -= int(ends[last] - ends[offset])
            taken += last - offset
            if last < len(self.sizes) or taken == self.most:
                return position + taken  # else it goes on into the next pass

    def _pass(self, number: int) -> "_Pass":
        order = rng(self.seed, "slide order", number).permutation(len(self.sizes))
        ends = np.concatenate([[0], np.cumsum(self.sizes[order])])
        if self.room is None:
            return _Pass(order, ends, [])
        begin = np.arange(len(order))
        fits = np.searchsorted(ends, ends[:-1] + self.room, side="right") - 1
        last = np.maximum(np.minimum(fits, begin + self.most), begin + 1)
        return _Pass(order, ends, [end if end < len(order) else None for end in last.tolist()])


@dataclass(frozen=True)
class _Pass:
    """A pass's permuted sequences (n,), how many tiles lie before each and before the end (n + 1,), and where a lane
    that begins at each is full, None where that isn't within the pass."""

    order: np.ndarray
    ends: np.ndarray
    fills: list[int | None]
