"""What a tile objective sees: crops on the device, augmented and normalised, and the masks of the global ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Target = Callable[[], Tensor]
"""Computes a micro-batch's targets when they are wanted: probabilities ``(n, K)``, or of regression ``(n, width)``."""


@dataclass
class TileBatch:
    """A micro-batch of ``tiles`` tiles.

    ``crops``: per crop size, the global one first, ``(images (views * tiles, 3, side, side) float, views)``; view
    after view, each view's tiles in stream order. ``masks``: bool ``(global views * tiles, rows, columns)``.
    ``targets``: by kind, what an objective's ``prepare`` found out from all micro-batches of the step.
    ``masked_numbers``: `masked`, where it is known; a GPU that is asked makes everybody wait. ``mpp``: (tiles,) float32,
    µm/px at which each tile was read, NaN where its source doesn't know. ``kept``: what `StochasticDepth.draw` says of
    each crop size, where the loader has drawn it.
    """

    crops: list[tuple[Tensor, int]]
    masks: Tensor
    targets: dict[str, Target] | None = None
    masked_numbers: Tensor | None = None
    mpp: Tensor | None = None
    kept: Sequence[Tensor] | None = None

    @property
    def tiles(self) -> int:
        """Their number."""
        images, views = self.crops[0]
        return len(images) // views

    @property
    def masked(self) -> Tensor:
        """``(M,)`` int64, ascending: which of ``masks.flatten()`` are true."""
        return self.masks.flatten().nonzero()[:, 0] if self.masked_numbers is None else self.masked_numbers

    @property
    def crop_shares(self) -> Tensor:
        """``(M,)``: of each of `masked`, one over the number of masked patches of its crop."""
        masks = self.masks.flatten(1)
        return (1 / masks.sum(1).clamp(min=1)).index_select(0, self.masked // masks.shape[1])
