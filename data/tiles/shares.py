"""Whose turn it is in a mixture: the shares of the weights, exact in the long run, found at any position by counting.

Two members: of the first ``n`` draws ``⌊n·w⌋`` are the first one's, so its share is never off by a whole draw. More
members: the first takes its share of all draws, the second its share of those left over, and so on. It is integer
arithmetic throughout, so nothing drifts however long a run is.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from data.fault import Fault

FINEST = 10**6  # the weights as whole numbers may sum to this: positions beyond 10¹² still fit in 64 bits


class PartShares:
    """The sequence of members ``0 … K − 1`` with positive ``weights`` (any scale).

    After ``n`` draws a member was drawn ``n · weight / sum`` times, give or take less than K. It is periodic: after
    ``period`` draws the shares are exact. Raises Fault for weights that aren't positive, or are as fine as parts in a
    million.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights if math.isfinite(weight)]
        if not exact or len(exact) < len(weights) or min(exact) <= 0:
            raise Fault(
                f"the weights of a mixture are positive numbers, not {list(weights)}; leave out what isn't wanted."
            )
        scale = lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        common = int(np.gcd.reduce(whole))
        self.whole = [weight // common for weight in whole]
        self.period = sum(self.whole)
        if self.period > FINEST:
            raise Fault(f"the weights {list(weights)} are finer than parts in a million; round them.")
        # A member's weight, and what is left of the sum where its turn to choose comes.
        self._left = [sum(self.whole[member:]) for member in range(len(self.whole))]

    def counts(self, position: int) -> list[int]:
        """How often each member is among the first ``position`` draws."""
        found = []
        for weight, left in zip(self.whole, self._left, strict=True):
            found.append(position * weight // left)
            position -= found[-1]
        return found

    def members(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For draws at ``positions`` ``(n,)`` int64: the member drawn, and how often it was drawn before; ``(n,)``
        each."""
        member = np.empty(len(positions), dtype=np.int64)
        before = np.empty(len(positions), dtype=np.int64)
        open_, left_over = np.arange(len(positions)), positions.astype(np.int64)
        for number, (weight, left) in enumerate(zip(self.whole, self._left, strict=True)):
            taken = left_over * weight // left
            mine = (left_over + 1) * weight // left > taken
            member[open_[mine]], before[open_[mine]] = number, taken[mine]
            open_, left_over = open_[~mine], (left_over - taken)[~mine]
        return member, before
