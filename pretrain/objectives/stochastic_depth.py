"""From the crops that a residual branch runs on to their rows of a packed sequence; see `data.stochastic_depth`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.vit import KeptSamples


def kept_samples(
    kept: Sequence[Tensor], views: Sequence[tuple[int, int]], tiles: int
) -> list[tuple[KeptSamples, KeptSamples]]:
    """The kept samples of both branches of every block.

    ``kept``: per crop size the crops, as `StochasticDepth.draw` numbers them, int64 ``(blocks, 2, kept)``. ``views``:
    per crop size ``(views, tokens per crop)``; the packed sequence holds, per crop size, view after view of ``tiles``
    tiles each.
    """
    offset, parts = 0, []
    for crops, (count, tokens) in zip(kept, views, strict=True):
        rows = (crops.unsqueeze(-1) * tokens + torch.arange(tokens, device=crops.device)).flatten(2) + offset
        parts.append((rows, (crops.shape[-1], tokens), count * tiles / crops.shape[-1]))
        offset += count * tiles * tokens
    rows = torch.cat([part[0] for part in parts], dim=2)  # (blocks, 2, kept tokens)
    shapes, scales = [part[1] for part in parts], [part[2] for part in parts]
    return [(KeptSamples(first, shapes, scales), KeptSamples(second, shapes, scales)) for first, second in rows]
