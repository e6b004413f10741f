"""Which samples skip which residual branch.

DINOv2 drops samples, not activations: a branch runs on a random subset of the batch, the residual scaled up by
``samples / kept``. "The batch" is one GPU's there; here it is a group of a set number of tiles in stream order, drawn
by (seed, step, group), so that the same tiles skip the same branches at any world size.
"""

from collections.abc import Sequence

import numpy as np
import torch

from data.keyed import rng
from data.on_device import on_device
from models.vit import KeptSamples


def kept_of(crops: int, rate: float) -> int:
    """How many ``crops`` of a group a branch runs on."""
    return max(1, int(crops * (1 - rate)))


def kept_samples(
    views: Sequence[tuple[int, int]],
    tiles: int,
    *,
    group: int,
    rate: float,
    depth: int,
    seed: int,
    step: int,
    first: int,
    device: torch.device,
) -> list[tuple[KeptSamples, KeptSamples]] | None:
    """The kept samples of both branches of each of ``depth`` blocks, or None where ``rate`` is 0.

    ``views``: per crop size ``(views, tokens per crop)``; the packed sequence holds, per crop size, view after view of
    ``tiles`` tiles each, of which ``first`` is the number of the first in the global batch. Of the ``views * group``
    crops of a group `kept_of` are kept.
    """
    if rate == 0:
        return None
    draws = [rng(seed, "stochastic depth", step, first // group + g) for g in range(tiles // group)]
    offset, parts = 0, []
    for count, tokens in views:
        crops = count * group
        keep = kept_of(crops, rate)
        chosen = [np.sort(draw.random((depth, 2, crops)).argsort(-1)[..., :keep], -1) for draw in draws]
        # Crop c of a group is view c // group of its tile c % group; in the batch, views lie `tiles` apart.
        samples = [c // group * tiles + g * group + c % group for g, c in enumerate(chosen)]
        index = on_device(np.concatenate(samples, -1), device)
        rows = (index.unsqueeze(-1) * tokens + torch.arange(tokens, device=device)).flatten(2) + offset
        parts.append((rows, (index.shape[-1], tokens), crops / keep))
        offset += count * tiles * tokens
    rows = torch.cat([part[0] for part in parts], dim=2)  # (depth, 2, kept tokens)
    shapes, scales = [part[1] for part in parts], [part[2] for part in parts]
    return [(KeptSamples(first, shapes, scales), KeptSamples(second, shapes, scales)) for first, second in rows]
