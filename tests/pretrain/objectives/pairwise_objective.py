"""An objective as a user writes one: a projector of its own without ``initialise()``, and patch tokens compared in
pairs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.objectives.interface import Moment, Objective


def off_diagonal(similar: Tensor, way: str) -> Tensor:
    """``(B, n, n)`` → ``(B, n, n - 1)``: all pairs of a sample but each with itself, in one of the ways in which people
    write it."""
    n = similar.shape[1]
    apart = ~torch.eye(n, dtype=torch.bool, device=similar.device)
    if way == "index":
        return similar[:, apart].unflatten(1, (n, n - 1))
    if way == "masked_select":
        return similar.masked_select(apart).unflatten(0, (len(similar), n, n - 1))
    if way == "where":
        rows, columns = torch.where(apart)
        return similar[:, rows, columns].unflatten(1, (n, n - 1))
    keep = torch.ones(n, n, dtype=torch.bool, device=similar.device)
    keep.fill_diagonal_(False)
    return torch.stack([one[keep].unflatten(0, (n, int(keep[0].sum()))) for one in similar])


class Scale(nn.Module):
    """Times a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log.exp()


class Pairwise(Objective):
    """Patches of a crop are to be unlike each other."""

    def __init__(self, make_encoder: Callable[[], Any], *, width: int, way: str = "index") -> None:
        super().__init__()
        self.way, self.encoder = way, make_encoder()
        self.projector = nn.Sequential(
            nn.Linear(self.encoder.width, width), nn.BatchNorm1d(width), nn.Linear(width, width)
        )
        nn.init.constant_(self.projector[2].bias, 0.25)
        self.scale = Scale()
        self.register_buffer("centre", torch.ones(width))

    def trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "projector": self.projector, "scale": self.scale}

    def loss(self, batch: Any, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        (tokens,) = self.encoder([batch.crops[0][0]])
        patches = self.projector(tokens.patches.flatten(0, 1)).unflatten(0, tokens.patches.shape[:2])
        unit = F.normalize(patches - self.centre, dim=-1)
        return self.scale(off_diagonal(unit @ unit.mT, self.way).square()).mean(), {}
