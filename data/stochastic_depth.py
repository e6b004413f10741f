"""Which crops skip which residual branch.

DINOv2 drops samples, not activations: a branch runs on a random subset of the batch, the residual scaled up by
``samples / kept``. "The batch" is one GPU's there; here it is a group of a set number of tiles in stream order, drawn
by (seed, step, group), so that the same tiles skip the same branches at any world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.keyed import rng


@dataclass(frozen=True)
class StochasticDepth:
    """``rate`` of the crops of each ``group`` of tiles skip a branch; two branches in each of so many ``blocks``."""

    group: int
    rate: float
    blocks: int

    def kept_of(self, crops: int) -> int:
        """How many ``crops`` of a group a branch runs on."""
        return max(1, int(crops * (1 - self.rate)))

    def draw(self, views: Sequence[int], tiles: int, *, seed: int, step: int, first: int) -> list[np.ndarray]:
        """Of each crop size, of which a tile has so many ``views``, the crops that are kept: int64 ``(blocks, 2,
        kept)``.

        Crops are numbered view after view, each with its ``tiles``, the first of which is the ``first``-th of the
        global batch. Of the ``views * group`` crops of a group `kept_of` are kept.
        """
        group, found = self.group, []
        draws = [rng(seed, "stochastic depth", step, first // group + g) for g in range(tiles // group)]
        for count in views:
            crops = count * group
            shape, keep = (self.blocks, 2, crops), self.kept_of(crops)
            chosen = [np.sort(draw.random(shape).argsort(-1)[..., :keep], -1) for draw in draws]
            # Crop c of a group is view c // group of its tile c % group; in the batch, views lie `tiles` apart.
            parts = [c // group * tiles + g * group + c % group for g, c in enumerate(chosen)]
            found.append(np.concatenate(parts, -1))
        return found
