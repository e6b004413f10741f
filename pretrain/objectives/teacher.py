"""The teacher: an exponential moving average of the student, computed on each rank's own shards."""

import torch
from torch import Tensor, nn

from pretrain.run.across_ranks import local_shard


@torch.no_grad()
def copy(student: nn.Module, teacher: nn.Module) -> None:
    """Make ``teacher`` equal to ``student``; both are sharded alike, so nothing is communicated."""
    for s, t in _pairs(student, teacher):
        local_shard(t).copy_(local_shard(s))


@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """``teacher ← momentum · teacher + (1 − momentum) · student``.

    On local shards: a foreach kernel over plain tensors takes a twentieth of the time that it takes over DTensors.
    """
    pairs = list(_pairs(student, teacher))
    torch._foreach_lerp_([local_shard(t) for _, t in pairs], [local_shard(s) for s, _ in pairs], 1 - momentum)


def _pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(student.parameters(), teacher.parameters(), strict=True))
