"""A tensor's part on this rank, and sums over a run's ranks for what belongs to the global batch. Without a process
group they are no-ops."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def world_size() -> int:
    """Processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, or the tensor itself; it shares memory with its argument."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gloo_group() -> dist.ProcessGroup | None:
    """A group of all ranks for exchanges between CPUs, apart from every other; every rank makes it at the same
    moment."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None  # type: ignore[return-value]  # all are members


def total(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of ``x`` over the ranks (of ``group``). Not differentiable: use it on constants and on teacher
    outputs."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x, group=group)
    return x


def together(x: T) -> list[T]:
    """What every rank has, in order, on all of them: things of any kind, small and seldom."""
    parts: list[Any] = [x] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, x)
    return parts


def gathered(x: Tensor) -> Tensor:
    """``x``, of the same shape on every rank, from all of them in order: ``(ranks, *shape)``. Not differentiable."""
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    if world_size() == 1:
        parts[0] = x
    else:
        dist.all_gather(parts, x)
    return torch.stack(parts)


def end_to_end(x: Tensor) -> Tensor:
    """``x`` (n, …), n of its own on every rank, from all of them one after another: ``(Σ n, …)``."""
    if world_size() == 1:
        return x
    lengths = gathered(torch.tensor(len(x), device=x.device)).tolist()
    padded = x.new_zeros(max(lengths), *x.shape[1:])
    padded[: len(x)] = x
    return torch.cat([part[:length] for part, length in zip(gathered(padded), lengths, strict=True)])


def add_up(*tensors: Tensor) -> None:
    """Each becomes its sum over the ranks: what is too large to be held twice, as `total` does."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_first(x: Tensor) -> Tensor:
    """The first rank's ``x``, in the place of that of the others, which has the same shape."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def log_total_exp(x: Tensor) -> Tensor:
    """``log Σ_ranks exp(x)`` elementwise, shifted by the largest so that nothing overflows. Not differentiable."""
    if world_size() == 1:
        return x
    top = x.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    return torch.log(total((x - top).exp())) + top
