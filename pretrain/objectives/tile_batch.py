"""What a tile objective sees: crops on the device, augmented and normalised, and the masks of the global ones."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Target = Callable[[], Tensor]
"""Computes a micro-batch's targets, probabilities ``(n, K)``, when they are wanted."""


@dataclass
class TileBatch:
    """A micro-batch of ``tiles`` tiles.

    ``crops``: per crop size, the global one first, ``(images (views * tiles, 3, side, side) float, views)``; view
    after view, each view's tiles in stream order. ``masks``: bool ``(global views * tiles, rows, columns)``.
    ``targets``: by kind, what an objective's ``prepare`` found out from all micro-batches of the step.
    """

    crops: list[tuple[Tensor, int]]
    masks: Tensor
    targets: dict[str, Target] | None = None
