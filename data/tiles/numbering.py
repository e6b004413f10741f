"""One numbering over several things that each count their own: slides, folders of shards, members of a mixture."""

from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np


class Numbering:
    """``counts`` items of each part, numbered on from one part to the next; ``starts`` (parts + 1,) is where each
    begins, and the whole ends."""

    def __init__(self, counts: Iterable[int]) -> None:
        self.starts = np.array([*accumulate(counts, initial=0)], dtype=np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        """The part that has item ``number``, and its number there."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, int(number - self.starts[part])

    def number(self, part: int, own: int) -> int:
        """The number of a part's item ``own``."""
        return int(self.starts[part] + own)

    def sort_out(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each part that has some of ``numbers`` (n,), with their numbers there in the same order."""
        parts = np.searchsorted(self.starts, numbers, side="right") - 1
        for part in np.unique(parts).tolist():
            yield part, numbers[parts == part] - self.starts[part]
