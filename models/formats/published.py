"""A published encoder: its weights under our names, and how it may be put into a network of ours."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.vit import VisionTransformer, resample_positions

Weights = dict[str, Tensor]

QKV_WEIGHT, QKV_BIAS = ".attn.qkv.weight", ".attn.qkv.bias"
ANY_GRID = 14  # patches a side, of 224 pixels and patches of 16
LAYER_SCALE = 1e-5  # DINOv2's initial value; the learned one is in the weights


@dataclass
class PublishedWeights:
    """Weights under our names, on the source's own position grid, and what their shapes don't tell."""

    format: str
    weights: Weights  # without pos_embed where positions are rotary
    heads: int | None  # None where the source doesn't say
    position_antialias: bool = True  # how the source resamples positions to another crop size
    position_offset: float = 0.0
    left_out: list[str] = field(default_factory=list)  # parts of the source that are no encoder, such as heads
    place: str = ""  # where in the source it was found
    norm_epsilon: float | None = 1e-6  # None where the source doesn't say
    said: list[str] = field(default_factory=list)  # what reading it has changed

    def __post_init__(self) -> None:
        """Raises ValueError where the positions, the class token's aside, are no square grid."""
        if self.rotary:
            return
        count = self.weights["pos_embed"].shape[1] - 1
        if math.isqrt(count) ** 2 != count:
            raise ValueError(f"its {count} positions of patches are no square grid")

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary, DINOv3's."""
        return "pos_embed" not in self.weights

    @property
    def grid(self) -> int:
        """Patches a side of the position grid; of rotary positions any."""
        return ANY_GRID if self.rotary else math.isqrt(self.weights["pos_embed"].shape[1] - 1)

    def settings(self) -> dict[str, Any]:
        """The settings of a `VisionTransformer` for these weights. Raises ValueError where the heads aren't known."""
        if self.heads is None:
            raise ValueError("weights don't show how many heads attention has, and nothing beside them says so")
        if self.norm_epsilon is None:
            raise ValueError("weights don't show the epsilon of norms, and nothing beside them says so")
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
            "position_embedding": "rope" if self.rotary else "learned",
            "qkv_bias": self.qkv_bias,
            "norm_epsilon": self.norm_epsilon,
            "own_cls_norm": "cls_norm.weight" in weights,
            "own_local_cls_norm": "local_cls_norm.weight" in weights,
        }

    @property
    def qkv_bias(self) -> str:
        """Which of queries, keys and values have a bias. Beside rotary positions zeros are none for keys."""
        biases = [tensor for name, tensor in self.weights.items() if name.endswith(QKV_BIAS)]
        if not biases:
            return "none"
        return "no_key" if self.rotary and not any(of_keys(bias).any() for bias in biases) else "all"

    def fit(self, network: VisionTransformer) -> tuple[Weights, list[str]]:
        """The weights for ``network``, and sentences about everything that isn't taken as it stands.

        Positions of another grid are resampled as the source itself resamples them. A mask token that the format
        doesn't keep is left out. Raises ValueError naming every weight that is missing, unexpected or of another shape,
        and with all settings to change for what shapes don't show: positions, heads, the epsilon of norms.
        """
        if others := list(self._other_settings(network)):
            words, settings = zip(*others, strict=True)
            raise ValueError(f"{', '.join(words)}: set {' '.join(f'model.{setting}' for setting in settings)}")
        weights, said = dict(self.weights), list(self.said)
        if self.place:
            said.append(f"the encoder is the part {self.place} of it")
        if self.heads is None:
            said.append(f"how many heads it has isn't written there: taken to be the model's {network.heads}")
        if self.norm_epsilon is None:
            said.append(f"nor is the epsilon of its norms: taken to be the model's {network.norm_epsilon:g}")
        said += self._fit_biases(weights, network)
        if network.local_cls_norm is not None and "local_cls_norm.weight" not in weights and "norm.weight" in weights:
            like = "cls_norm" if "cls_norm.weight" in weights else "norm"
            weights |= {f"local_cls_norm.{leaf}": weights[f"{like}.{leaf}"] for leaf in ("weight", "bias")}
            said.append(f"{self.format} keeps no local_cls_norm: it starts as its {like}")
        if "mask_token" not in weights:
            said.append(f"{self.format} keeps no mask token: it starts anew")
        if self.left_out:
            said.append(f"not part of the encoder, left out: {listed(self.left_out)}")
        if not self.rotary and self.grid != network.grid and weights["pos_embed"].shape[-1] == network.width:
            here = f"{network.grid} × {network.grid}"
            said.append(f"positions resampled from {self.grid} × {self.grid} to {here}, as {self.format} does it")
            weights["pos_embed"] = regridded(
                weights["pos_embed"], network.grid, self.position_antialias, self.position_offset
            )
        theirs, ours = (
            (self.position_antialias, self.position_offset),
            (network.position_antialias, network.position_offset),
        )
        if theirs != ours and not self.rotary:
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

    def _other_settings(self, network: VisionTransformer) -> Iterator[tuple[str, str]]:
        """In what else than weights it is another network, in words, each with the setting that is wanted."""
        if self.rotary != (network.position_embedding == "rope"):
            kind, setting = ("rotary", "rope") if self.rotary else ("a grid of", "learned")
            words = f"it has {kind} positions, and the model position_embedding={network.position_embedding}"
            yield words, f"position_embedding={setting}"
        if self.heads is not None and self.heads != network.heads:
            yield f"it has {self.heads} heads and the model {network.heads}", f"heads={self.heads}"
        if self.norm_epsilon is not None and self.norm_epsilon != network.norm_epsilon:
            words = f"its norms have epsilon {self.norm_epsilon:g} and the model's {network.norm_epsilon:g}"
            yield words, f"norm_epsilon={self.norm_epsilon:g}"

    def _fit_biases(self, weights: Weights, network: VisionTransformer) -> list[str]:
        """Give ``weights`` the biases of queries, keys and values that the network has, where that changes no feature.

        Returns sentences about it. Raises ValueError where the network lacks biases that aren't zero.
        """
        biases = {name: tensor for name, tensor in weights.items() if name.endswith(QKV_BIAS)}
        lacking = biases if network.qkv_bias == "none" else {}
        if network.qkv_bias == "no_key":
            lacking = {name: of_keys(bias) for name, bias in biases.items()}
        if nonzero := [name for name, bias in lacking.items() if bias.any()]:
            raise ValueError(
                f"{listed(nonzero)} {'is' if len(nonzero) == 1 else 'are'} not zero, and the model has no such bias: set"
                f" model.qkv_bias={self.qkv_bias}"
            )
        if network.qkv_bias == "none":
            for name in biases:
                del weights[name]
            return ["its biases of queries, keys and values are zero, and the model has none"] if biases else []
        if biases or not self.rotary:
            return []
        for name in list(weights):
            if name.endswith(QKV_WEIGHT):
                weights[name.removesuffix("weight") + "bias"] = torch.zeros_like(weights[name][:, 0])
        return ["it has no biases of queries, keys and values: the model's start at zero"]


def require_dinov2s_parts(network: VisionTransformer, format: str) -> None:
    """Raise ValueError for a network with parts that ``format``, made for DINOv2's, has no place for."""
    parts = {
        "position_embedding=rope": network.pos_embed is None,
        "qkv_bias=none": network.qkv_bias == "none",
        f"norm_epsilon={network.norm_epsilon:g}": network.norm_epsilon != 1e-6,
        "own_cls_norm=true": network.cls_norm is not None,
        "own_local_cls_norm=true": network.local_cls_norm is not None,
    }
    if found := [part for part, there in parts.items() if there]:
        raise ValueError(
            f"{format} has no place for {listed(f'model.{part}' for part in found)}: hand on the run itself"
        )


def of_keys(bias: Tensor) -> Tensor:
    """The keys' third of a bias of queries, keys and values."""
    return bias.chunk(3)[1]


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
