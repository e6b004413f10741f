"""Whether patch features still tell places apart. In long runs they grow alike and noisy while class tokens go on
improving (DINOv3, Siméoni et al. 2025, §4); Gram anchoring is against that."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.objectives.tile_batch import TileBatch
from pretrain.run.across_ranks import total


@torch.no_grad()
def dense_figures(encoder: nn.Module, parts: Sequence[TileBatch]) -> dict[str, float]:
    """Mean cosines in the global crops of all ranks' micro-batches.

    ``patch_cosine``: of two patches of a crop; ``neighbour_cosine``: of two that touch. Their difference is what a map of
    cosines shows: it decays where maps become noise, and both near 1 show nothing. ``class_patch_cosine``: of a patch
    and its class token, which rises as patches turn into copies of it.
    """
    sums: Tensor | None = None
    crops = 0
    for part in parts:
        images, size = part.crops[0][0], part.masks.shape[-2:]
        (tokens,) = encoder([images])
        found = map_cosines(tokens.cls.float(), tokens.patches.float().unflatten(1, size)).sum(1)
        sums, crops = found if sums is None else sums + found, crops + len(images)
    assert sums is not None
    means = (total(sums) / total(torch.full_like(sums, float(crops)))).tolist()
    return dict(zip(("patch_cosine", "neighbour_cosine", "class_patch_cosine"), means, strict=True))


def map_cosines(cls: Tensor, patches: Tensor) -> Tensor:
    """Class tokens ``(B, width)`` and patches ``(B, rows, columns, width)`` → ``(3, B)``: of each crop the mean cosine of
    two patches, of two neighbours, and of a patch with the class token."""
    unit, own = F.normalize(patches, dim=-1), F.normalize(cls, dim=-1)
    flat = unit.flatten(1, 2)
    n = flat.shape[1]
    # Σ_ij u_i·u_j = |Σ u_i|², of which the n pairs of a patch with itself are taken off.
    pairs = (flat.sum(1).square().sum(-1) - n) / max(n * (n - 1), 1)
    beside = [(unit[:, 1:] * unit[:, :-1]).sum(-1), (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)]
    neighbours = torch.cat([cosines.flatten(1) for cosines in beside], dim=1).mean(1)
    return torch.stack([pairs, neighbours, (flat @ own.unsqueeze(-1)).squeeze(-1).mean(1)])
