"""Stochastic depth as a step draws it, for networks that are tried without a loader."""

from collections.abc import Sequence

import torch

from data.stochastic_depth import StochasticDepth
from models.vit import KeptSamples
from pretrain.objectives.stochastic_depth import kept_samples


def drawn_samples(
    views: Sequence[tuple[int, int]],
    tiles: int,
    *,
    group: int,
    rate: float,
    depth: int,
    seed: int = 0,
    step: int = 0,
    first: int = 0,
) -> list[tuple[KeptSamples, KeptSamples] | None] | None:
    """Kept samples of both branches of each of ``depth`` blocks; ``views``: per crop size ``(views, tokens per
    crop)``. None where ``rate`` is 0."""
    if rate == 0:
        return None
    drops = StochasticDepth(group, (rate,) * depth)
    drawn = drops.draw([count for count, _ in views], tiles, seed=seed, step=step, first=first)
    return kept_samples(drops, [torch.from_numpy(crops) for crops in drawn], views, tiles)
