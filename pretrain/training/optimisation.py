"""AdamW as the recipes use it: a learning rate and weight decay multiplier per parameter, clipping per network."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.allowed import Agreements, numbers, one_of, within
from pretrain.objectives.interface import BACKBONE
from pretrain.objectives.schedules import cosine, cosine_then_constant
from pretrain.run.across_ranks import local_shard, total

SCALINGS = {
    "none": lambda batch: 1.0,
    "sqrt_1024": lambda batch: math.sqrt(batch / 1024),  # DINOv2
    "linear_256": lambda batch: batch / 256,  # DINO, MAE
}


def check_warmup(warmup_steps: int, steps: int, schedule_steps: int | None) -> None:
    """Raise ValueError for a warm-up that doesn't end."""
    if warmup_steps > (schedule_steps or steps):
        raise ValueError(
            "the warm-up is longer than the run; make it shorter, or where the run is to stop before its schedules end,"
            " give their length, schedule_steps"
        )


MOST_STEPS = (
    10**9
)  # hundreds of the longest published runs; with more, a moment's place in its schedule is no longer exact

RANDOM_WEIGHTS = (
    "with random weights in place of a slide run's, 'pretrain embed stage=slide random=true' embeds slides, and 'pretrain"
    " probe' has a row of such weights beside the others"
)


@dataclass
class Optim:
    """The settings under ``optim:``, explained beside their values in ``configs/optim/``."""

    steps: Annotated[int, within(least=1, most=MOST_STEPS, absent=(("0", RANDOM_WEIGHTS),))]
    schedule_steps: Annotated[int | None, within(least=1, most=MOST_STEPS)]
    lr: Annotated[float, within(least=0)]
    lr_scaling: Annotated[str, one_of(*SCALINGS)]
    lr_start: Annotated[float, within(least=0)]
    lr_final: Annotated[float, within(least=0)]
    warmup_steps: Annotated[int, within(least=0)]
    cosine_steps: Annotated[int | None, within(least=0, most=MOST_STEPS)]
    weight_decay: Annotated[float, within(least=0)]
    weight_decay_final: Annotated[float, within(least=0)]
    betas: Annotated[list[float], numbers(2), within(least=0, below=1)]
    clip: Annotated[float, within(least=0)]
    clip_each: Annotated[float, within(least=0)]
    layer_decay: Annotated[float, within(above=0)]
    patch_embed_lr: Annotated[float, within(least=0)]
    frozen_last_layer_steps: Annotated[int, within(least=0)]
    frozen_backbone_steps: Annotated[int, within(least=0)]
    max_skipped: Annotated[int, within(least=0)]

    agreements: ClassVar[Agreements] = {("warmup_steps", "steps", "schedule_steps"): check_warmup}


def scaled_lr(settings: Optim, batch_size: int) -> float:
    """The peak learning rate for a global batch, by the recipe's rule."""
    return settings.lr * SCALINGS[settings.lr_scaling](batch_size)


def rates_at(step: int, settings: Optim, batch_size: int) -> tuple[float, float]:
    """Learning rate and weight decay of a step."""
    steps = settings.schedule_steps or settings.steps
    shape: dict[str, Any] = {
        "peak": scaled_lr(settings, batch_size),
        "final": settings.lr_final,
        "warmup": settings.warmup_steps,
        "start": settings.lr_start * SCALINGS[settings.lr_scaling](batch_size),
    }
    if settings.cosine_steps is None:
        lr = cosine(step, total=steps, **shape)
    else:
        lr = cosine_then_constant(step, cosine=settings.cosine_steps, **shape)
    return lr, cosine(step, peak=settings.weight_decay, final=settings.weight_decay_final, total=steps)


@dataclass(frozen=True)
class Multipliers:
    """How one parameter's learning rate and weight decay differ from the schedule's."""

    lr: float
    weight_decay: float
    last_layer: bool


def multipliers(name: str, dimensions: int, depth: int, layer_decay: float, patch_embed_lr: float) -> Multipliers:
    """DINOv2's rule (``get_params_groups_with_decay``) for a parameter of so many dimensions, by its name in its
    network.

    lr: ``layer_decay^(depth + 1 − id)`` with id 0 for tokens, positions and the patch embedding (times
    ``patch_embed_lr``), ``i + 1`` for block i, ``depth + 1`` for everything else. Weight decay: none for vectors, which
    are the biases, norms and layer scales. ``last_layer`` marks a head's prototypes, whose learning rate starts frozen.
    """
    block = re.search(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.", name)
    embedding = re.search(r"(^|\.)(pos_embed|patch_embed\.|mask_token|cls_token|reg_token|register_tokens)", name)
    layer = int(block.group(1)) + 1 if block else 0 if embedding else depth + 1
    lr = layer_decay ** (depth + 1 - layer) * (patch_embed_lr if "patch_embed" in name else 1.0)
    return Multipliers(lr, 1.0 if dimensions > 1 else 0.0, "last_layer" in name)


def parameter_groups(networks: dict[str, nn.Module], settings: Optim) -> list[dict]:
    """AdamW's parameter groups: one for each distinct set of multipliers, in the order in which they are first met."""
    groups: dict[tuple[Multipliers, bool], dict] = {}
    for part, network in networks.items():
        backbone = part == BACKBONE
        blocks = getattr(network, "blocks", None)
        depth = len(blocks) if blocks is not None else 0
        # Layer decay is the encoder's: a head's learning rate is the schedule's own.
        decay = settings.layer_decay if depth else 1.0
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                kind = multipliers(name, parameter.ndim, depth, decay, settings.patch_embed_lr)
                facts = {
                    "lr_multiplier": kind.lr,
                    "weight_decay_multiplier": kind.weight_decay,
                    "last_layer": kind.last_layer,
                    "backbone": backbone,
                }
                group = groups.setdefault((kind, backbone), {"params": [], **facts})
                group["params"].append(parameter)
    return list(groups.values())


def set_rates(
    optimiser: torch.optim.Optimizer,
    lr: float,
    weight_decay: float,
    last_layer_frozen: bool,
    backbone_frozen: bool = False,
) -> None:
    """Put the schedule's learning rate and weight decay into every group, times its multipliers; zeros where it is
    frozen.

    A frozen parameter doesn't move, but AdamW's moments go on, so that it starts with an estimate of its own.
    """
    for group in optimiser.param_groups:
        frozen = (last_layer_frozen and group["last_layer"]) or (backbone_frozen and group["backbone"])
        group["lr"] = 0.0 if frozen else lr * group["lr_multiplier"]
        group["weight_decay"] = (
            0.0 if backbone_frozen and group["backbone"] else weight_decay * group["weight_decay_multiplier"]
        )


def clip(parameters: Iterable[nn.Parameter], limit: float, each: float = 0.0) -> Tensor:
    """Scale every tensor's gradient so that its own norm is at most ``each``, and then all so that their joint norm is
    at most ``limit`` (0: no limit); returns the joint norm before, a scalar.

    Norms are over the shards of all ranks; working on local shards, it costs one small all-reduce. Parameters without a
    gradient count as zeros.
    """
    everything = list(parameters)
    gradients = [local_shard(p).new_zeros(1) if p.grad is None else local_shard(p.grad) for p in everything]
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    squares = torch.stack(torch._foreach_norm(gradients, dtype=wide)).square()
    if not each:
        squares = squares.sum()
    if isinstance(everything[0], DTensor):  # replicas of a shard hold the same gradient: count it once
        squares = total(squares, everything[0].device_mesh.get_group("shard"))
    norm = clipped = squares.sum().sqrt()
    if each:
        factors = (each / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factors.to(gradients[0].dtype).unbind())
        clipped = (squares * factors.square()).sum().sqrt()
    if limit > 0:
        torch._foreach_mul_(gradients, (limit / (clipped + 1e-6)).clamp(max=1.0))
    return norm
