"""Gram anchoring (DINOv3, Siméoni et al. 2025, §4): how patches of an image are like each other is to stay as it was."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.objectives.losses.precision import at_least_float32

GRAM_NEGATIVES = ("kept", "teachers_dropped", "dropped")
"""What becomes of cosines below 0: they are compared; the teacher's are 0; both are (the reference's
``remove_only_teacher_neg``, as its code does it, and ``remove_neg``)."""


def gram_distance(student: Tensor, teacher: Tensor, negatives: str = "kept") -> Tensor:
    """Mean squared difference of the matrices of cosines of an image's patches, of both ``(B, P, width)``; widths may
    differ. ``negatives`` is one of GRAM_NEGATIVES."""
    ours, theirs = (F.normalize(at_least_float32(x), dim=-1) for x in (student, teacher.detach()))
    ours, theirs = ours @ ours.mT, theirs @ theirs.mT
    if negatives == "dropped":
        ours = ours.clamp(min=0)
    return (ours - (theirs if negatives == "kept" else theirs.clamp(min=0))).square().mean()


@torch.no_grad()
def on_grid(patches: Tensor, side: int) -> Tensor:
    """Patches of square images ``(B, P, width)`` → ``(B, side², width)`` on a grid of another side, bicubically and
    without antialiasing, as the reference's are."""
    grid = round(patches.shape[1] ** 0.5)
    if grid == side:
        return patches
    square = at_least_float32(patches).mT.unflatten(2, (grid, grid))
    return F.interpolate(square, (side, side), mode="bicubic", align_corners=False).flatten(2).mT
