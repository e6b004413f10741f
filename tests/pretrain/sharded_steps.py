"""What the processes of `test_sharding` do: whole training steps of both stages, on any number of processes.

``python -m tests.pretrain.sharded_steps FOLDER`` imports everything once, forks into four processes, and has them work off
``FOLDER/runs.pkl``: for each run as many of them as it needs form a group and rank 0 writes what came out.
"""

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.embeddings import EmbeddingStore
from data.slide_sequences import SlideSequences
from data.standardisation import Statistics
from models.longnet import LongNet
from pretrain.across_ranks import total, world_size
from pretrain.objective import Moment, Objective
from pretrain.objectives.slide_mae import SlideMAE
from pretrain.optimisation import Optim, clip, parameter_groups, set_rates
from pretrain.sharding import lay_mesh, materialise, shard
from pretrain.training import gradients
from tests.pretrain import tile_objectives

PROCESSES, STEPS, TILES = 4, 10, 16
TINY_VIT: dict[str, Any] = {"drop_path": 0.4, "registers": 2, "depth": 3}


@dataclass(frozen=True)
class Run:
    """One run to be compared with another: where, what, and with what settings."""

    stage: str  # tile or slide
    world: int
    shard_size: int | None = None
    precision: str = "float64"
    accumulate: int = 1
    checkpointing: str = "none"
    compiled: bool = False


@dataclass(frozen=True)
class Outcome:
    losses: list[float]  # one a step
    norms: list[list[float]]  # of each network's gradient before clipping
    weights: dict[str, Tensor]  # everything at the end, whole: teacher and centres too


def on_meta(stage: str) -> Objective:
    """The stage's objective as a run builds it."""
    with torch.device("meta"):
        if stage == "tile":
            return tile_objectives.unfilled_dinov2(tile_objectives.encoder(**TINY_VIT), prototypes=25)
        encoder = partial(
            LongNet, input_width=16, width=16, depth=3, heads=4, feed_forward_width=32, segment_lengths=[16, 64],
            dilated_ratios=[1, 2], dropout=0.2, drop_path=0.3, compatible=False,
        )  # fmt: skip
        return SlideMAE(
            encoder, decoder_width=16, decoder_depth=2, decoder_heads=2, decoder_feed_forward_width=32, weighting="slide"
        )  # fmt: skip


def micro_batches(run: Run, folder: Path) -> Callable[[int], list[tuple[Any, int]]]:
    """``of(step)``: this rank's micro-batches of a global batch that is the same for every number of processes."""
    shares = run.world * run.accumulate
    mine = range(dist.get_rank() * run.accumulate, (dist.get_rank() + 1) * run.accumulate)
    if run.stage == "tile":
        each = TILES // shares

        def tiles(step: int) -> list[tuple[Any, int]]:
            whole = tile_objectives.batch(TILES, seed=step)
            return [(tile_objectives.part(whole, i * each, (i + 1) * each), i * each) for i in mine]

        return tiles
    store = EmbeddingStore.open(folder / "embeddings")
    sequences = SlideSequences(
        store, Statistics.of(store), batch_size=16, batch_tokens=None, lanes=8, seed=0, field_cells=0, validation_fraction=0.0,
        crop=0.875, shift_grid=10, flip=0.5, mask="random", mask_ratio=0.75, block_cells=3,
    )  # fmt: skip

    def slides(step: int) -> list[tuple[Any, int]]:
        parts = [sequences.batch(step, i, shares) for i in mine]
        return [(part, part.positions[0] - sequences.packing.start(step)) for part in parts]

    return slides


def built(run: Run) -> Objective:
    """The run's objective on this group's processes, sharded and filled."""
    objective = on_meta(run.stage)
    shard(objective, lay_mesh("cpu", run.world, run.shard_size), run.precision, run.checkpointing, run.compiled)
    materialise(objective, torch.device("cpu"), seed=1)
    return objective


def train(run: Run, optim: Optim, folder: Path) -> Outcome:
    """The steps that `Training` takes, without Lightning around them."""
    objective, of = built(run), micro_batches(run, folder)
    optimiser = torch.optim.AdamW(parameter_groups(objective.trained(), optim), lr=0.0, fused=True)
    losses, norms = [], []
    for step in range(STEPS):
        moment = Moment(step, STEPS, seed=5)
        set_rates(optimiser, optim.lr, optim.weight_decay, last_layer_frozen=step < 2)
        optimiser.zero_grad()
        figures = gradients(objective, of(step), moment, lambda loss: loss.backward())
        norms.append([clip(network.parameters(), optim.clip).item() for network in objective.trained().values()])
        optimiser.step()
        objective.after_step(moment)
        losses.append(total(figures["loss"]).item() / world_size())
    return Outcome(losses, norms, {name: whole(value) for name, value in objective.state_dict().items()})


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def process(rank: int, folder: Path, runs: list[Run], optim: Optim) -> None:
    torch.set_num_threads(1)
    for number, run in enumerate(runs):
        if rank >= run.world:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / f'meeting-{number}'}", rank=rank, world_size=run.world,
            timeout=timedelta(seconds=120),
        )  # fmt: skip
        outcome = train(run, optim, folder)
        if rank == 0:
            torch.save(outcome, folder / f"{number}.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    here = Path(sys.argv[1])
    mp.start_processes(process, (here, *pickle.loads((here / "runs.pkl").read_bytes())), PROCESSES, start_method="fork")
