"""Processes that do one command together without training: all of them know its settings, one says what is to be done, and
writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from data.fault import Fault
from pretrain.run.launched import environment_number, rank, started_together

T = TypeVar("T")

# That a process has ended the others see at once, by its connection; this is for work that one does alone.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Peers:
    """The processes of one command; ``device`` is this one's, as the user named it or the GPU of its number."""

    device: str
    group: dist.ProcessGroup | None = None

    @property
    def number(self) -> int:
        """Which of them this process is, from 0."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def count(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.number == 0

    def agreed(self, value: T) -> T:
        """The first process's ``value``, which the others wait for."""
        if self.group is None:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.group, device=torch.device("cpu"))
        return said[0]

    def meet(self) -> None:
        """Wait until all are here."""
        if self.group is not None:
            dist.all_reduce(torch.zeros(1), group=self.group)


@contextmanager
def met(setting: str, processes: int, device: str) -> Iterator[Peers]:
    """So many processes while a block runs; one is alone. ``setting``: what says how many; ``device``: "" for a GPU where
    there is one. Raises Fault where others were started than that many."""
    if processes == 1:
        yield Peers(device)
        return
    started = started_together()
    if started != processes:
        raise Fault(
            f"{setting}={processes}, and {started} {'process was' if started == 1 else 'processes were'}"
            " started: let torchrun start as many, or start none with it."
        )
    if torch.device(device or "cpu").index is not None:
        raise Fault(f"device={device} is one device, and each of {processes} processes needs its own: leave it out.")
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise Fault(
            f"{processes} processes were started, and nothing says where they meet: launch=slurm writes a job that does, or"
            " set MASTER_ADDR to the first one's host and MASTER_PORT to a free port there."
        )
    on_gpus = device == "cuda" or (not device and torch.cuda.is_available())
    if on_gpus:
        device = f"cuda:{environment_number('LOCAL_RANK', environment_number('SLURM_LOCALID', 0))}"
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo", rank=rank() or 0, world_size=processes, timeout=PATIENCE
    )
    try:
        yield Peers(device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
