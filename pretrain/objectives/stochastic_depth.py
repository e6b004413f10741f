"""From the crops that a residual branch runs on to their rows of a packed sequence; see `data.stochastic_depth`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.stochastic_depth import StochasticDepth
from models.vit import KeptSamples


def kept_samples(
    depth: StochasticDepth, kept: Sequence[Tensor], views: Sequence[tuple[int, int]], tiles: int
) -> list[tuple[KeptSamples, KeptSamples] | None]:
    """The kept samples of both branches of every block; None: all are.

    ``kept``: per crop size the crops, as ``depth`` has drawn them. ``views``: per crop size ``(views, tokens per
    crop)``; the packed sequence holds, per crop size, view after view of ``tiles`` tiles each.
    """
    offset, of_sizes = 0, []
    for crops, (count, tokens) in zip(kept, views, strict=True):
        rows = crops.unsqueeze(-1) * tokens + torch.arange(offset, offset + tokens, device=crops.device)
        of_sizes.append(depth.split(rows, count, tiles))
        offset += count * tiles * tokens
    found: list[tuple[KeptSamples, KeptSamples] | None] = []
    for parts in zip(*of_sizes, strict=True):  # of a block, per crop size (2, kept, tokens)
        shapes = [(part.shape[1], part.shape[2]) for part in parts]
        scales = [count * tiles / crops for (count, _), (crops, _) in zip(views, shapes, strict=True)]
        if all(scale == 1 for scale in scales):
            found.append(None)
            continue
        first, second = torch.cat([part.flatten(1) for part in parts], dim=1)
        found.append((KeptSamples(first, shapes, scales), KeptSamples(second, shapes, scales)))
    return found
