"""Which crops skip which residual branch.

DINOv2 drops samples, not activations: a branch runs on a random subset of the batch, the residual scaled up by
``samples / kept``. "The batch" is one GPU's there; here it is a group of a set number of tiles in stream order, drawn
by (seed, step, group), so that the same tiles skip the same branches at any world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from data.keyed import rng


@dataclass(frozen=True)
class StochasticDepth:
    """Of the crops of each ``group`` of tiles, ``rates`` of them skip a branch: a rate a block, for both of its
    branches."""

    group: int
    rates: tuple[float, ...]

    def kept_of(self, crops: int) -> list[int]:
        """How many ``crops`` of a group a branch runs on, by block."""
        return [max(1, int(crops * (1 - rate))) for rate in self.rates]

    def split(self, kept: Tensor, views: int, tiles: int) -> list[Tensor]:
        """What `draw` says of the crops of a size, or anything else of each ``(n, …)``: by block ``(2, kept, …)``."""
        sizes = [tiles // self.group * count for count in self.kept_of(views * self.group)]
        return [part.unflatten(0, (2, -1)) for part in kept.split([2 * size for size in sizes])]

    def draw(self, views: Sequence[int], tiles: int, *, seed: int, step: int, first: int) -> list[np.ndarray]:
        """Of each crop size, of which a tile has so many ``views``, the crops that are kept, int64: block after block
        both branches' (see `split`).

        Crops are numbered view after view, each with its ``tiles``, the first of which is the ``first``-th of the
        global batch. Of the ``views * group`` crops of a group `kept_of` are kept.
        """
        group, found = self.group, []
        draws = [rng(seed, "stochastic depth", step, first // group + g) for g in range(tiles // group)]
        for count in views:
            crops = count * group
            shape = (len(self.rates), 2, crops)
            kept = np.arange(crops) < np.array(self.kept_of(crops)).reshape(-1, 1, 1)  # the first so many are
            chosen = [np.sort(np.where(kept, draw.random(shape).argsort(-1), crops), -1) for draw in draws]
            # Crop c of a group is view c // group of its tile c % group; in the batch, views lie `tiles` apart.
            parts = [c // group * tiles + g * group + c % group for g, c in enumerate(chosen)]
            kept = np.broadcast_to(kept, shape)
            found.append(np.concatenate(parts, -1)[np.concatenate([kept] * len(parts), -1)])
        return found
