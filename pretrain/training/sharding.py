"""FSDP2: the mesh of processes, and how networks are wrapped. Lightning owns the mesh; see `ShardedStrategy`.

Order, stated once:  build on the meta device → every block: recompute → compile → shard → the network: shard → allocate → fill.

Each network (an encoder, a head) is a root of its own. A teacher is wrapped exactly as its student is, so the moving
average runs shard by shard; it keeps nothing for a backward, so there is nothing to recompute. One code path serves one
process and many, CPU (gloo) and GPU (NCCL).
"""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from data.fault import Fault
from models.initialise import assign, fill, key
from pretrain.objectives.interface import Objective
from pretrain.run.across_ranks import local_shard, total
from pretrain.training.trainer_settings import PRECISIONS


def processes_a_copy(world_size: int, shard_size: int | None) -> int:
    """How many processes share one copy of the networks. Raises Fault where that doesn't divide them all."""
    shard = world_size if shard_size is None else shard_size
    if shard < 1 or world_size % shard:
        raise Fault(f"trainer.shard_size={shard} does not divide the {world_size} processes.")
    return shard


def lay_mesh(device: str, world_size: int, shard_size: int | None) -> DeviceMesh:
    """The mesh of a run's processes: one dimension ``shard``, after one ``replicate`` where copies are fewer than
    processes."""
    shard = processes_a_copy(world_size, shard_size)
    if shard == world_size:
        return init_device_mesh(device, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))


def shard(
    objective: Objective, mesh: DeviceMesh, precision: str, checkpointing: str = "none", compiled: bool = False
) -> None:
    """Wrap every network of an objective that was built on the meta device: blocks first, then the network.

    ``checkpointing``: see `pretrain.training.trainer_settings.CHECKPOINTING`. ``compiled`` blocks go through torch.compile, each by itself: all blocks of
    a network share one compilation, and what gathers and frees their parameters stays outside of it. One process has
    nothing to gather, and pays a few per cent of a small network's step for the units all the same.
    """
    masters, compute = PRECISIONS[precision]
    inside = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=masters)
    outside = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=masters, output_dtype=masters)
    objective.to(masters)
    trained = list(objective.trained().values())
    for network in [*trained, *objective.frozen().values()]:
        for block in units_of(network):
            if checkpointing != "none" and network in trained:
                block.forward = recomputed(block.forward, checkpointing == "selective")
            if compiled:
                block.forward = torch.compile(block.forward)
            fully_shard(block, mesh=mesh, mp_policy=inside)
        prefetch(units_of(network))
        # A teacher has no backward, so nothing but this would free its root's gathered parameters; at one process the
        # mistake goes unnoticed.
        try:
            fully_shard(network, mesh=mesh, mp_policy=outside, reshard_after_forward=True)
        except ValueError as error:
            raise Fault(
                f"{type(objective).__name__}: a {type(network).__name__} can't be shared out over processes: {error}"
            ) from error


def prefetch(units: Sequence[nn.Module]) -> None:
    """Gather the next unit's parameters while one computes, in the forward and, backwards, in the backward.

    By itself FSDP2 asks for a unit's when its forward begins: where the host isn't far ahead of its device, the device
    waits for them.
    """
    for before, after in pairwise(units):
        cast(FSDPModule, before).set_modules_to_forward_prefetch([cast(FSDPModule, after)])
        cast(FSDPModule, after).set_modules_to_backward_prefetch([cast(FSDPModule, before)])


def units_of(network: nn.Module) -> list[nn.Module]:
    """What a network says is gathered, recomputed and compiled by itself, each once: the ``units()`` of the modules in
    it that have such a method, which a module of that name isn't, in the order in which they run. A network that says
    nothing is one unit."""
    stacks = [units for module in network.modules() if inspect.ismethod(units := getattr(module, "units", None))]
    return list(dict.fromkeys(unit for units in stacks for unit in units()))


def recomputed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    """``forward``, whose backward computes its insides anew: all, or all but what is `worth_keeping`.

    Draws come out the same: those of our networks are keyed, and torch's own generator is set back for them.
    """
    contexts: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, worth_keeping)} if selective else {}
    )

    def forward_and_again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    return forward_and_again


def worth_keeping(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of linear maps and of attention kernels, which are nearly all of a block's arithmetic.

    Not those of batched products: attention that is written out as products has them, one for each pair of tokens.
    """
    costly = re.search(r"^aten::(mm|addmm)$|attention|flash", operator.name())
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


@torch.no_grad()
def materialise(
    objective: Objective,
    device: torch.device,
    seed: int,
    begin: Callable[[Objective], None] | None = None,
    make_objective: Callable[[], Objective] | None = None,
) -> None:
    """Give an objective on the meta device memory and first values. Raises Fault naming a tensor left without, on all
    ranks.

    ``begin`` may put other values into the trained networks before a teacher is copied from them. ``make_objective``
    builds the same objective anew: what no network's ``initialise`` gives a value has the one that its constructor
    gives it there.
    """
    objective.to_empty(device=device)
    named = [*objective.named_parameters(), *objective.named_buffers()]
    tensors = {name: tensor for name, tensor in named if tensor.is_floating_point()}
    for tensor in tensors.values():
        local_shard(tensor).fill_(torch.nan)  # fresh memory may hold anything, plausible numbers too
    missed: list[str] = []
    for name, network in objective.trained().items():
        missed += [f"{name}: {path}" for path in fill(network, seed, name)]
    constructed = None
    if make_objective is not None and (missed or len(named) > len(tensors)):
        constructed = as_constructed(make_objective, seed)
        for name, network in objective.trained().items():
            theirs = constructed.trained()[name].state_dict()
            for path, tensor in network.state_dict(keep_vars=True).items():
                if f"{name}: {path}" in missed and not theirs[path].is_meta:
                    assign(tensor, theirs[path])
    if begin is not None:
        begin(objective)
    objective.start()
    # A rank sees its own shards only, which may be empty: all must come to one answer, or those that go on wait
    # forever.
    unset = _unset(tensors)
    if unset and make_objective is not None:
        constructed = constructed or as_constructed(make_objective, seed)
    if constructed is not None:
        theirs = dict([*constructed.named_parameters(), *constructed.named_buffers()])
        for name, tensor in named:
            if (name in unset or name not in tensors) and name in theirs and not theirs[name].is_meta:
                assign(tensor, theirs[name])
        unset = _unset(tensors)
    if unset:
        raise Fault(
            f"{type(objective).__name__}: {unset[0]} has no initial value: its network's initialise(), or the"
            f" objective's start(), doesn't fill it ({len(unset)} such tensors)"
        )


def as_constructed(make_objective: Callable[[], Objective], seed: int) -> Objective:
    """An objective with the values that its constructors draw, by ``seed`` alone; what is built on the meta device, an
    encoder say, has none."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(key(seed, "objective"))
        return make_objective()


def _unset(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that hold a number that isn't finite, on any rank."""
    unset = torch.stack([(~torch.isfinite(local_shard(tensor))).any() for tensor in tensors.values()])
    return [name for name, times in zip(tensors, total(unset.int()).tolist(), strict=True) if times]
