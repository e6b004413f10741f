"""A published encoder: its weights under our names, and how it may be put into a network of ours."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.vit import VisionTransformer, resample_positions

Weights = dict[str, Tensor]

LAYER_SCALE = 1e-5  # DINOv2's initial value; the learned one is in the weights


@dataclass
class PublishedWeights:
    """Weights under our names, on the source's own position grid, and what their shapes don't tell."""

    format: str
    weights: Weights
    heads: int | None  # None where the source doesn't say
    position_antialias: bool  # how the source resamples positions to another crop size
    position_offset: float
    left_out: list[str] = field(default_factory=list)  # parts of the source that are no encoder, such as heads
    place: str = ""  # where in the source it was found

    def __post_init__(self) -> None:
        """Raises ValueError where the positions, the class token's aside, are no square grid."""
        count = self.weights["pos_embed"].shape[1] - 1
        if math.isqrt(count) ** 2 != count:
            raise ValueError(f"its {count} positions of patches are no square grid")

    @property
    def grid(self) -> int:
        """Patches a side of the position grid."""
        return math.isqrt(self.weights["pos_embed"].shape[1] - 1)

    def settings(self) -> dict[str, Any]:
        """The settings of a `VisionTransformer` for these weights. Raises ValueError where the heads aren't known."""
        if self.heads is None:
            raise ValueError("weights don't show how many heads attention has, and nothing beside them says so")
        weights = self.weights
        hidden = weights["blocks.0.mlp.fc2.weight"].shape[1]
        patch = weights["patch_embed.proj.weight"].shape[-1]
        return {
            "image_size": self.grid * patch,
            "patch_size": patch,
            "width": weights["cls_token"].shape[-1],
            "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
            "heads": self.heads,
            "feed_forward": "swiglu" if weights["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden else "mlp",
            "feed_forward_width": hidden,
            "registers": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
            "layer_scale": LAYER_SCALE if "blocks.0.ls1.gamma" in weights else 0.0,
            "position_antialias": self.position_antialias,
            "position_offset": self.position_offset,
        }

    def fit(self, network: VisionTransformer) -> tuple[Weights, list[str]]:
        """The weights for ``network``, and sentences about everything that isn't taken as it stands.

        Positions of another grid are resampled as the source itself resamples them. A mask token that the format
        doesn't keep is left out. Raises ValueError naming every weight that is missing, unexpected or of another shape,
        and for another number of heads, which shapes don't show.
        """
        if self.heads is not None and self.heads != network.heads:
            raise ValueError(f"it has {self.heads} heads and the model {network.heads}: set model.heads={self.heads}")
        weights, said = dict(self.weights), []
        if self.place:
            said.append(f"the encoder is the part {self.place} of it")
        if self.heads is None:
            said.append(f"how many heads it has isn't written there: taken to be the model's {network.heads}")
        if "mask_token" not in weights:
            said.append(f"{self.format} keeps no mask token: it starts anew")
        if self.left_out:
            said.append(f"not part of the encoder, left out: {listed(self.left_out)}")
        if self.grid != network.grid and weights["pos_embed"].shape[-1] == network.width:
            here = f"{network.grid} × {network.grid}"
            said.append(f"positions resampled from {self.grid} × {self.grid} to {here}, as {self.format} does it")
            weights["pos_embed"] = regridded(
                weights["pos_embed"], network.grid, self.position_antialias, self.position_offset
            )
        theirs, ours = (
            (self.position_antialias, self.position_offset),
            (network.position_antialias, network.position_offset),
        )
        if theirs != ours:
            said.append(
                f"at other crop sizes this model resamples positions with position_antialias={ours[0]},"
                f" position_offset={ours[1]}, where {self.format} has {theirs[0]}, {theirs[1]}: set them to get its"
                " features there"
            )
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        missing = sorted(wanted.keys() - weights.keys() - {"mask_token"})
        unexpected = sorted(weights.keys() - wanted.keys())
        misshapen = [
            f"{name} is {tuple(weights[name].shape)}, the model's {wanted[name]}"
            for name in sorted(wanted.keys() & weights.keys())
            if tuple(weights[name].shape) != wanted[name]
        ]
        complaints = [
            f"{what} {listed(names)}"
            for what, names in (("missing:", missing), ("unexpected:", unexpected), ("of another shape:", misshapen))
            if names
        ]
        if complaints:
            raise ValueError("; ".join(complaints))
        return weights, said


def require_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the tensors that hold NaN or infinity."""
    if wrong := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{listed(wrong)} {'holds' if len(wrong) == 1 else 'hold'} values that aren't finite")


def regridded(pos_embed: Tensor, grid: int, antialias: bool, offset: float) -> Tensor:
    """``(1, 1 + old², width)`` → ``(1, 1 + grid², width)``; the class token's position comes first and stays."""
    patches = resample_positions(pos_embed[:, 1:], grid, grid, antialias=antialias, offset=offset)
    return torch.cat([pos_embed[:, :1].float(), patches], dim=1)


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names for a sentence, the first few of them written out."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
