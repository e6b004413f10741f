"""Processes that embed slides together: each computes a share of every slide's tokens (see `models.sequence_parallel`).

All of them read the same slides and find the same vectors; the first one says what is to be done, and writes.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from data.fault import Fault
from models.sequence_parallel import Group
from models.slide_network import SlideNetwork
from pretrain.encoders.run_checkpoint import RUN_CONFIG
from pretrain.encoders.slide_encoders import SlideEncoder
from pretrain.run.folder import read_config
from pretrain.run.launched import environment_number
from pretrain.settings.plugins import locate_class

T = TypeVar("T")


@dataclass(frozen=True)
class Embedders:
    """The processes of one command; ``device`` is this one's, as the user named it or the GPU of its number."""

    device: str
    group: Group = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.group is None or dist.get_rank(self.group) == 0

    def agreed(self, value: T) -> T:
        """The first process's ``value``, which the others wait for."""
        if self.group is None:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.group, device=torch.device("cpu"))
        return said[0]

    def share_slides(self, encoder: SlideEncoder) -> None:
        """Have them share every slide that ``encoder`` sees. Raises Fault where its network can't be shared so."""
        try:
            encoder.network.encoder.share_slides(self.group)
        except ValueError as error:
            raise Fault(f"processes_per_slide= doesn't fit {encoder.name}: {error}.") from error


def require_sharing(checkpoint: str, plugins: Collection[str]) -> None:
    """Raise Fault where ``checkpoint`` is a run, or one of its checkpoints, whose kind of network can't be shared."""
    path = Path(checkpoint)
    for run in (path, *path.resolve().parents[:2]):
        if (run / RUN_CONFIG).is_file():
            target = (read_config(run).get("model") or {}).get("_target_", "")
            if target and not (kind := locate_class(target, SlideNetwork, plugins)).shares_slides:
                raise Fault(f"processes_per_slide= doesn't fit {run}: {kind.__name__} can't share a slide.")
            return


@contextmanager
def met(processes: int, device: str) -> Iterator[Embedders]:
    """So many processes while a block runs; one is alone. ``device``: "" for a GPU where there is one. Raises Fault
    where others were started than that many."""
    if processes == 1:
        yield Embedders(device)
        return
    started = environment_number("WORLD_SIZE", 1)
    if started != processes:
        raise Fault(
            f"processes_per_slide={processes}, and {started} {'process was' if started == 1 else 'processes were'}"
            " started: let torchrun start as many, or start none with it."
        )
    if torch.device(device or "cpu").index is not None:
        raise Fault(f"device={device} is one device, and each of {processes} processes needs its own: leave it out.")
    on_gpus = device == "cuda" or (not device and torch.cuda.is_available())
    if on_gpus:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    try:
        yield Embedders(device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
