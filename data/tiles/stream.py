"""The order of tiles: a pure function of (sources, seed, position).

    parts     what is mixed: data sets, magnifications, each with a weight       data.tiles.shares says whose turn it is
    lanes     parallel readers, each with an endless sequence of every part      data.tiles.passes says which tile is next
    batch     the same number of tiles from every lane, lane after lane

A lane is a reader with a position: how many tiles it has taken. Counting tells how many of them were of each part, so
the state of the whole is one integer, the step. Ranks own neighbouring lanes: a rank's share of a global batch is a
contiguous slice of it, and a change of world size changes who reads a tile, never which tile is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.fault import Fault
from data.tiles.passes import Passes
from data.tiles.shares import PartShares


@dataclass(frozen=True)
class Part:
    """One part of a mixture, the whole of it where nothing is mixed."""

    block_sizes: np.ndarray  # (blocks,) int64: runs of neighbouring tiles, which number on through all parts
    weight: float = 1.0  # its share of the tiles of every lane, in the scale of the other parts' weights
    name: str = "the source"  # for messages


class Stream:
    """Global batches of tile numbers; those of the first part are ``0 … T₀ − 1``, the second part's go on from there.

    ``lanes`` bounds the world size (a rank owns at least one lane) and is part of the order, as ``batch_size``,
    ``window`` (blocks that are mixed) and ``seed`` are: change one and the order is another. With ``slides_per_lane`` a
    lane's share of a batch is so many equal groups, each of one block, and blocks are to be cut within slides.
    Raises Fault where the numbers don't divide.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        batch_size: int,
        lanes: int,
        window: int,
        seed: int,
        slides_per_lane: int | None = None,
    ) -> None:
        self.batch_size, self.lanes, self.window = batch_size, lanes, window
        self.group = group_size(batch_size, lanes, slides_per_lane)
        self.shares = PartShares([part.weight for part in parts])
        self.passes: list[Passes] = []
        for part in parts:
            first, key = sum(p.tiles for p in self.passes), len(self.passes)
            passes = Passes(
                part.block_sizes, lanes=lanes, window=window, group=self.group, seed=seed, key=key, first=first
            )
            if passes.tiles < lanes:
                raise Fault(f"{part.name} holds {passes.tiles} tiles, fewer than data.lanes={lanes}; set it lower.")
            self.passes.append(passes)
        self.tiles = sum(passes.tiles for passes in self.passes)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Tile numbers ``(batch_size / world_size,)`` of a rank's share of global batch ``step`` (both count from
        0)."""
        each = self.batch_size // self.lanes
        return np.concatenate([self.lane(lane, step * each, each) for lane in self.owned(rank, world_size)])

    def owned(self, rank: int, world_size: int) -> range:
        """The lanes that a rank reads. Raises Fault where they can't be shared out evenly."""
        if self.lanes % world_size:
            raise Fault(
                f"data.lanes={self.lanes} is not a multiple of the {world_size} processes; set data.lanes to a multiple"
                " of it."
            )
        each = self.lanes // world_size
        return range(rank * each, (rank + 1) * each)

    def block(self, number: int) -> range:
        """The tiles of the block that tile ``number`` is of."""
        passes = next(passes for passes in self.passes if number < passes.first + passes.tiles)
        which = int(np.searchsorted(passes.starts, number, side="right")) - 1
        return range(int(passes.starts[which]), int(passes.starts[which] + passes.sizes[which]))

    def lane(self, lane: int, position: int, count: int) -> np.ndarray:
        """``count`` tile numbers of ``lane`` from its ``position`` on (tiles consumed so far)."""
        if len(self.passes) == 1:
            return self.passes[0].tile_numbers(lane, position, count)
        # Lanes are as far apart in the sequence of turns as their shares of a batch lie in it. So a batch is one run of
        # that sequence, and holds its shares too, as closely as whole groups allow.
        ahead = lane * (self.batch_size // self.lanes // self.group)
        within = np.arange(position, position + count)
        part, turn = self.shares.members(within // self.group + ahead)
        numbers = np.empty(count, dtype=np.int64)
        for which, skipped in enumerate(self.shares.counts(ahead)):
            here = np.flatnonzero(part == which)
            if len(here):
                start = (int(turn[here[0]]) - skipped) * self.group + int(within[here[0]]) % self.group
                numbers[here] = self.passes[which].tile_numbers(lane, start, len(here))
        return numbers


def group_size(batch_size: int, lanes: int, slides_per_lane: int | None) -> int:
    """Tiles that are dealt out together: 1, or a lane's share of the batch over ``slides_per_lane``. Raises Fault."""
    if batch_size % lanes:
        raise Fault(
            f"data.batch_size={batch_size} is not a multiple of data.lanes={lanes}: a batch takes the same number from"
            " every lane."
        )
    if slides_per_lane is None:
        return 1
    if slides_per_lane < 1 or batch_size // lanes % slides_per_lane:
        raise Fault(
            f"data.slides_per_lane={slides_per_lane} doesn't divide the {batch_size // lanes} tiles that a lane gives"
            " to a batch."
        )
    return batch_size // lanes // slides_per_lane
