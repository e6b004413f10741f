"""How coordinates of rotary positions are scaled while training, so that an encoder learns to see any size (DINOv3, §3.2).

One log-uniform factor for each crop size, drawn by (seed, step, crop size): the same for all tiles of a step, on any
number of ranks, in any number of micro-batches. The reference draws one anew in every block.
"""

from collections.abc import Sequence
from typing import Any

from data.keyed import rng
from pretrain.objectives.interface import Moment


def drawn_scales(encoder: Any, sizes: Sequence[int], moment: Moment) -> dict[str, list[float]]:
    """``scales`` for an encoder's pass over crops of ``sizes`` pixels; nothing where it doesn't train, or asks for none
    (``position_rescale``)."""
    most = getattr(encoder, "position_rescale", 1.0)
    if most == 1 or not encoder.training:
        return {}
    return {"scales": [scale_of(size, most, moment) for size in sizes]}


def scale_of(size: int, most: float, moment: Moment) -> float:
    """Log-uniform from ``1 / most`` to ``most``."""
    return float(most ** rng(moment.seed, "position scale", moment.step, size).uniform(-1, 1))
