"""Heads that turn a token into prototype scores (Caron et al. 2021, appendix C), or into a projection."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.operations import Operations, linear_maps


class WeightNormLinear(nn.Module):
    """A bias-free linear whose row ``k`` is ``g_k * v_k / |v_k|``.

    DINOv2 starts every ``g`` at 1 and, contrary to common belief, trains it, with weight decay.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(outputs, 1))
        self.weight_v = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class PrototypeHead(nn.Module):
    """MLP with GELU → L2 norm → weight-normed linear: ``(…, inputs)`` → ``(…, prototypes)``. With ``normed`` False the
    last map is a plain one, DINOv3's; with ``frozen_norms`` prototypes keep the norm 1 (DINO's norm_last_layer)."""

    def __init__(
        self,
        inputs: int,
        *,
        prototypes: int,
        bottleneck: int,
        hidden: int,
        layers: int,
        normed: bool = True,
        frozen_norms: bool = False,
    ) -> None:
        super().__init__()
        self.prototypes = prototypes
        widths = [inputs, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths):
            modules += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        self.last_layer = (
            WeightNormLinear(bottleneck, prototypes) if normed else nn.Linear(bottleneck, prototypes, bias=False)
        )
        if frozen_norms:
            self.last_layer.weight_g.requires_grad_(False)

    @classmethod
    def of_shapes(cls, inputs: int, shapes: Mapping[str, Sequence[int]]) -> Self:
        """A head like the one whose parameters have these shapes, by name, for tokens of another width."""
        normed = "last_layer.weight_v" in shapes
        prototypes, bottleneck = shapes["last_layer.weight_v" if normed else "last_layer.weight"]
        layers = sum(bool(re.fullmatch(r"mlp\.\d+\.weight", name)) for name in shapes)
        hidden = shapes["mlp.0.weight"][0]
        return cls(inputs, prototypes=prototypes, bottleneck=bottleneck, hidden=hidden, layers=layers, normed=normed)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12))

    def operations(self, rows: float) -> Operations:
        """Of so many tokens' scores."""
        return linear_maps(rows, self)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """DINOv2's initial values: see `models.initialise`."""
        if name == "last_layer.weight_g":
            tensor.fill_(1.0)
        elif name == "last_layer.weight_v":  # torch's default for a linear: U(±1/√fan_in)
            bound = tensor.shape[1] ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)
        elif name.endswith(".weight"):
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
        elif name.endswith(".bias"):
            tensor.zero_()
        else:
            raise KeyError(name)


class Projector(nn.Module):
    """MLP with LayerNorm and GELU behind each hidden layer: ``(…, inputs)`` → ``(…, outputs)``."""

    def __init__(self, inputs: int, *, hidden: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths):
            modules += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-2])

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)  # type: ignore[no-any-return]

    def operations(self, rows: float) -> Operations:
        """Of so many tokens' projections."""
        return linear_maps(rows, self)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """torch's default for the weights of a linear map, U(±1/√fan_in), no biases: see `models.initialise`."""
        if name not in self.state_dict():
            raise KeyError(name)
        if tensor.ndim > 1:
            bound = tensor.shape[1] ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)
        else:
            tensor.fill_(1.0 if name.endswith(".weight") else 0.0)
