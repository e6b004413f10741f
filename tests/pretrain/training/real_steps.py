"""Steps that are really taken, to hold a plan against: their operations, and the memory that torch's CPU allocator gave
out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pretrain.objectives.interface import Moment
from pretrain.objectives.slide_mae import SlideMAE
from pretrain.plan.batches import SupposedSlides
from pretrain.plan.composed_run import compose_run
from pretrain.plan.rehearsal import CPU_ATTENTION, tensors_in
from pretrain.plan.run_shape import RunShape, run_shape
from pretrain.run.across_ranks import local_shard
from pretrain.training.gradients import gradients
from pretrain.training.optimisation import Optim, clip, parameter_groups
from pretrain.training.sharding import lay_mesh, materialise, shard

SLIDES = SupposedSlides(width=48, tiles=60, largest=100)
MOMENT = Moment(0, 10, 0)


def shape_of(*settings: str, slides: SupposedSlides = SLIDES) -> tuple[RunShape, Any]:
    """The shape of a run and its ``optim`` settings."""
    composed = compose_run(list(settings), [])
    values = dict(composed.tree.optim) | {"betas": list(composed.tree.optim.betas)}
    return run_shape(composed, slides), Optim(**values)


def filled(batch: Any, true: dict[int, int]) -> Any:
    """A batch whose tensors are real: noise, ascending places, masks with as many true as planned."""
    draw = torch.Generator().manual_seed(0)
    if hasattr(batch, "masks"):
        flat = torch.zeros(batch.masks.numel(), dtype=torch.bool)
        flat[torch.randperm(len(flat), generator=draw)[: true.get(len(flat), 0)]] = True
        batch.masks, batch.masked_numbers = flat.view(batch.masks.shape), flat.nonzero()[:, 0]
        for images, _ in batch.crops:
            images.normal_(generator=draw)
        return batch
    batch.embeddings.normal_(generator=draw)
    batch.mean.zero_(), batch.std.fill_(1)
    for store in batch.further:
        store.embeddings.normal_(generator=draw)
        store.mean.zero_(), store.std.fill_(1)
    if batch.centres is not None:
        batch.centres.normal_(generator=draw)
    batch.cells = torch.stack([torch.arange(len(batch.cells)) % 40, torch.arange(len(batch.cells)) // 40], 1)
    hidden, start = [], 0
    for n, m in zip(batch.lengths, batch.masked_lengths, strict=True):
        hidden.append(start + torch.randperm(n, generator=draw)[:m].sort().values)
        start += n
    batch.masked = torch.cat(hidden)
    seen = torch.ones(len(batch.embeddings), dtype=torch.bool)
    seen[batch.masked] = False
    batch.visible = seen.nonzero().flatten()
    return batch


@contextmanager
def one_process(backend: str = "gloo") -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def peak_of_sharing(rank: int, folder: Path, together: int, settings: tuple[str, ...], slides: SupposedSlides) -> None:
    """As one of ``together`` processes that share every slide: take a step, and leave its peak in a file named by the
    rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), together), rank=rank, world_size=together
    )
    run, optim = shape_of(*settings, slides=slides)
    (folder / str(rank)).write_text(str(Step(run, optim, "float32", "none", together=together).peak()))
    dist.destroy_process_group()


class Step:
    """A run's objective, its optimiser and a batch; call it to take a step."""

    def __init__(
        self, run: RunShape, optim: Optim, precision: str, checkpointing: str, accumulate: int = 1, together: int = 1
    ) -> None:
        with torch.device("meta"):
            self.objective = run.build()()
        processes = dist.get_world_size()
        shard(self.objective, lay_mesh("cpu", processes, processes), precision, checkpointing)
        if together > 1:
            assert isinstance(self.objective, SlideMAE)
            self.objective.share_slides(dist.new_subgroups(together)[0])
        materialise(self.objective, torch.device("cpu"), 0)
        self.optimiser = torch.optim.AdamW(parameter_groups(self.objective.trained(), optim), lr=0.0, fused=True)
        batch = run.batch(processes, accumulate, together=together)
        self.parts = [(filled(batch.make(), batch.true), i * batch.samples) for i in range(batch.parts)]

    def gradients(self) -> None:
        self.optimiser.zero_grad()
        gradients(self.objective, self.parts, MOMENT, lambda loss: loss.backward())

    def __call__(self) -> None:
        self.gradients()
        for network in self.objective.trained().values():
            clip(network.parameters(), 3.0)
        self.optimiser.step()
        self.objective.after_step(MOMENT)

    def held(self) -> int:
        """Bytes of parameters, buffers, optimiser and batch."""
        state = [value for values in self.optimiser.state.values() for value in values.values()]
        tensors: list[Tensor] = [
            *self.objective.parameters(),
            *self.objective.buffers(),
            *state,
            *tensors_in(self.parts),
        ]
        return sum(local_shard(tensor).nbytes for tensor in tensors)

    def peak(self) -> int:
        """Bytes at the highest moment of the second step: what is held, and what the allocator has given out
        besides."""
        self()
        self.optimiser.zero_grad()
        held = self.held()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self()
        # The allocator reports every allocation and release, those inside of kernels too.
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return held + most

    def flops(self) -> int:
        """Operations of a step by torch's own counter, which is told of the CPU's fused attention."""
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            self.gradients()
        return counter.get_total_flops()
