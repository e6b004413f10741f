"""Saving beside training: the state of this moment is copied, training goes on, and a thread writes the copy.

    wait: for the one before │ begin: copy to the CPU (the stall) │ thread: plan, write, publish → outcome
                                                                   │ training: next steps

The thread's exchanges with the other ranks go through a process group of their own, so they can't meet training's.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from data.fault import Fault
from data.files import free_bytes
from pretrain.run import checkpoints
from pretrain.run.across_ranks import gloo_group, local_shard, total
from pretrain.run.checkpoints import Writer


class Copies(DefaultStager):
    """torch's copies of a checkpoint's tensors, which are overwritten from the second time on, all by one call.

    torch goes through the attributes of every tensor each time, in Python, while training stands still.
    """

    def __init__(self, options: StagingOptions) -> None:
        super().__init__(options)
        self.non_blocking = options.use_non_blocking_copy
        self.copies: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any], **_: Any) -> Any:
        """A copy of the nested ``state_dict``, whose tensors are on the CPU."""
        given = dict(_tensors(state_dict))
        if _shapes(given) != _shapes(self.copies):
            staged = super().stage(state_dict)
            self.copies = dict(_tensors(staged))
            return staged
        copies = [local_shard(self.copies[place]) for place in given]
        torch._foreach_copy_(copies, [local_shard(tensor) for tensor in given.values()], self.non_blocking)
        if self.non_blocking:
            torch.cuda.current_stream().synchronize()
        return _with_tensors(state_dict, self.copies)


def _tensors(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in nested dictionaries, lists and tuples, with its place in them."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict | list | tuple):
        for name, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(one, (*place, name))


def _with_tensors(value: Any, tensors: Mapping[tuple[Any, ...], Tensor], place: tuple[Any, ...] = ()) -> Any:
    """The same dictionaries, lists and tuples around other ``tensors``."""
    if isinstance(value, Tensor):
        return tensors[place]
    if isinstance(value, dict):
        return {name: _with_tensors(one, tensors, (*place, name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        found = [_with_tensors(one, tensors, (*place, i)) for i, one in enumerate(value)]
        return found if isinstance(value, list) else tuple(found)
    return value


def _shapes(
    tensors: Mapping[tuple[Any, ...], Tensor],
) -> dict[tuple[Any, ...], tuple[torch.Size, torch.Size, torch.dtype]]:
    """Where tensors are, and what they are: their shape, that of this rank's shard, and the kind of their numbers."""
    return {place: (one.shape, local_shard(one).shape, one.dtype) for place, one in tensors.items()}


class Saver:
    """A run's checkpoints on their way to the disk, at most one at a time. Every rank makes one and calls it alike.

    An outcome, here and on every rank, is a sentence where the disk refused, and None where nothing is to be said.
    """

    def __init__(self, run: Path, keep: int, milestones: int | None) -> None:
        self.run, self.keep, self.milestones = run, keep, milestones
        self.group = gloo_group()
        gpu = torch.cuda.is_available()  # page-locked memory, so that the copy runs at the bus's speed
        # The memory of the copies is kept: touching fresh memory takes longer than copying into used.
        self.stager = Copies(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
            )
        )
        self.under_way: tuple[Writer, Future[Any]] | None = None

    def begin(self, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> str | None:
        """Have a checkpoint of this moment written while training goes on, after `wait`; or say that there is no room
        for it."""
        assert self.under_way is None
        if refusal := self._no_room(step, model, optimiser):
            return refusal
        writer = Writer(self.run, step, state, self.keep, self.milestones)
        future = dcp.async_save(
            checkpoints.contents(model, optimiser),
            storage_writer=writer,
            async_stager=self.stager,
            process_group=self.group,
        )
        assert isinstance(future, Future)
        self.under_way = writer, future
        return None

    def _no_room(self, step: int, model: nn.Module, optimiser: torch.optim.Optimizer) -> str | None:
        """A sentence, the same on every rank, where the disk has less room than a checkpoint of this moment takes."""
        needed, free = checkpoints.size(model, optimiser), 0
        if not dist.is_initialized() or dist.get_rank() == 0:
            free = free_bytes(checkpoints.folder(self.run))
        free = int(total(torch.tensor(free), self.group))
        if free >= needed:
            return None
        final = checkpoints.folder(self.run) / f"step-{step:08d}"
        return (
            f"the checkpoint {final} could not be written (it takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are"
            " free there)"
        )

    def outcome(self) -> str | None:
        """How the last one ended, told once, and None while it is still under way."""
        return self.wait() if self.under_way and self.under_way[1].done() else None

    def wait(self) -> str | None:
        """Wait for the one under way, and tell how it ended."""
        if self.under_way is None:
            return None
        (writer, future), self.under_way = self.under_way, None
        try:
            future.result()
        except CheckpointException as error:
            return checkpoints.refusal(writer, error)
        return None

    def save(self, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write a checkpoint of this moment and wait for it, after `wait`. Raises Fault where the disk refuses."""
        assert self.under_way is None
        last = f"The newest whole one is {checkpoints.newest(self.run)}."
        if refusal := self._no_room(step, model, optimiser):
            raise Fault(f"{refusal}; free some room and run the same command again. {last}")
        try:
            checkpoints.save(self.run, step, model, optimiser, state, self.keep, self.milestones, self.group)
        except Fault as fault:
            raise Fault(f"{fault} {last}") from fault
