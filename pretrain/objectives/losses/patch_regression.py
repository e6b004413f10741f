"""Patch targets as regression: what the teacher says of masked patches, normed, and how far a prediction is from it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.fused import fusible
from pretrain.objectives.losses.precision import at_least_float32


@torch.no_grad()
def normed_tokens(tokens: Tensor) -> Tensor:
    """Tokens ``(…, width)`` with mean 0 and variance 1 over their width each, ``√(var + 1e-5)``, in `wide` numbers
    (I-JEPA, Assran et al. 2023)."""
    return F.layer_norm(at_least_float32(tokens), tokens.shape[-1:])


@fusible
def patch_regression(predicted: Tensor, target: Tensor, weight: Tensor, crops: int) -> Tensor:
    """Smooth L1 with β = 1 of the M masked patches of ``crops`` crops:

        1 / crops · Σ_m weight[m] · mean_d h(predicted[m, d] − target[m, d]),   h(x) = x² / 2 to |x| = 1, |x| − ½ beyond

    ``predicted`` and ``target``: ``(M, width)``; ``weight``: ``(M,)``, one over the number of masked patches of each
    patch's crop, so that crops count equally.
    """
    distance = F.smooth_l1_loss(at_least_float32(predicted), target, reduction="none").mean(-1)
    return (distance * weight).sum() / crops
