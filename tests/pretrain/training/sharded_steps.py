"""What the processes of `test_sharding` do: whole training steps of both stages, on any number of processes.

``python -m tests.pretrain.training.sharded_steps FOLDER`` imports everything once, forks into four processes, and has
them work off ``FOLDER/tasks.pkl``. For each task as many of them as it needs form a group of their own, and each writes
what it found.
"""

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data.embeddings.grid_crops import CropSequences
from data.embeddings.sequences import SlideSequences
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from models.longnet import LongNet
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.slide_context import SlideContext
from pretrain.objectives.slide_ibot import SlideIBOT
from pretrain.objectives.slide_mae import SlideMAE
from pretrain.objectives.slide_pairs import SlidePairs
from pretrain.run.across_ranks import total, world_size
from pretrain.training.gradients import gradients
from pretrain.training.optimisation import Optim, clip, parameter_groups, set_rates
from pretrain.training.sharding import lay_mesh, materialise, shard
from tests.pretrain.objectives import tile_objectives
from tests.pretrain.objectives.tile_objectives import (
    unfilled_dino,
    unfilled_dinov2,
    unfilled_dinov3,
    unfilled_distil,
    unfilled_distil_heads,
    unfilled_jepa,
    unfilled_lejepa,
    unfilled_mae,
)

PROCESSES, STEPS, TILES = 4, 10, 16
CROPS: dict[str, Any] = {
    "global_count": 2,
    "global_side": 4,
    "local_count": 2,
    "local_side": 3,
    "tissue": 0.25,
    "vertical_flip": 0.5,
    "quarter_turn": 0.5,
    "masked_share": 0.5,
    "mask_ratios": [0.1, 0.5],
    "empty_cells": False,
}
CPU = torch.device("cpu")
VIT: dict[str, Any] = {"registers": 2, "depth": 3}
ROTARY: dict[str, Any] = {
    "position_embedding": "rope",
    "position_rescale": 2.0,
    "qkv_bias": "no_key",
    "own_cls_norm": True,
    "own_local_cls_norm": True,
}
TILE_OBJECTIVES: dict[str, Callable[[], Objective]] = {
    # 25 prototypes: two processes don't divide them.
    "dinov2": lambda: unfilled_dinov2(tile_objectives.encoder(**VIT, drop_path=0.4), prototypes=25),
    "rotary": lambda: unfilled_dinov2(tile_objectives.encoder(**VIT, **ROTARY, drop_path=0.4)),
    "dinov3": lambda: unfilled_dinov3(tile_objectives.encoder(**VIT, **ROTARY)),
    "jepa": lambda: unfilled_jepa(tile_objectives.encoder(**VIT, drop_path=0.4)),
    "dino": lambda: unfilled_dino(tile_objectives.encoder(**VIT, drop_path=0.4)),
    "distil": lambda: unfilled_distil(tile_objectives.encoder(**VIT, drop_path=0.4)),
    "distil_heads": lambda: unfilled_distil_heads(tile_objectives.encoder(**VIT, drop_path=0.4)),
    "lejepa": lambda: unfilled_lejepa(tile_objectives.encoder(**VIT)),
    "mae": lambda: unfilled_mae(tile_objectives.encoder(**VIT, position_embedding="sincos")),
}


@dataclass(frozen=True)
class Run:
    """One training run: where, of what, and with what settings."""

    objective: str  # one of TILE_OBJECTIVES or SLIDE_OBJECTIVES
    world: int = 1
    shard_size: int | None = None
    precision: str = "float64"
    accumulate: int = 1
    checkpointing: str = "none"
    compiled: bool = False
    together: int = 1  # processes that share a slide


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    losses: list[float]  # one a step
    norms: list[list[float]]  # of each network's gradient before clipping
    weights: dict[str, Tensor]  # everything at the end, whole: teacher and centres too


def built(run: Run) -> Objective:
    """The run's objective on this group's processes, as a run builds it: on the meta device, sharded, filled."""
    with torch.device("meta"):
        objective = (TILE_OBJECTIVES | SLIDE_OBJECTIVES)[run.objective]()
    shard(objective, lay_mesh("cpu", run.world, run.shard_size), run.precision, run.checkpointing, run.compiled)
    materialise(objective, CPU, seed=1)
    if run.together > 1:
        objective.share_slides(dist.new_subgroups(run.together)[0])  # type: ignore[operator]
    return objective


SLIDE_ENCODER = partial(
    LongNet, input_width=16, width=16, depth=3, heads=4, feed_forward_width=32, segment_lengths=[16, 64],
    dilated_ratios=[1, 2], dropout=0.2, drop_path=0.3, compatible=False,
)  # fmt: skip
DECODER: dict[str, Any] = {
    "decoder_width": 16,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "decoder_feed_forward_width": 32,
    "weighting": "slide",
}


def of_two_stores() -> LongNet:
    network = SLIDE_ENCODER()
    network.add_input(16)
    return network


def slide_ibot() -> SlideIBOT:
    return SlideIBOT(SLIDE_ENCODER, **SLIDE_IBOT)  # type: ignore[arg-type]


SLIDE_IBOT: dict[str, Any] = {
    **tile_objectives.TEACHING,
    **tile_objectives.HEAD,
    "prototypes": 25,
    "separate_ibot_head": False,
    "ibot_prototypes": 1,
    "ibot_bottleneck": 1,
    "dino_weight": 1.0,
    "ibot_weight": 1.0,
    "group_size": 2,
    **tile_objectives.SPREADING,
    "frozen_prototype_norms": False,
    "centring": "centre",
}
SLIDE_OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "slide_mae": lambda: SlideMAE(SLIDE_ENCODER, **DECODER),
    "slide_context": lambda: SlideContext(of_two_stores, **DECODER, decoder_start="token"),
    "slide_pairs": lambda: SlidePairs(
        SLIDE_ENCODER, pairs=8, farthest=2, pooled="mean_std", predictor_width=16, predictor_depth=1
    ),
    "slide_ibot": slide_ibot,
}


def micro_batches(run: Run, folder: Path) -> Callable[[int], list[tuple[Any, int]]]:
    """``of(step)``: this rank's micro-batches of a global batch that is the same for every number of processes."""
    shares = run.world // run.together * run.accumulate
    first = dist.get_rank() // run.together * run.accumulate
    mine = range(first, first + run.accumulate)
    if run.objective not in SLIDE_OBJECTIVES:
        each, views = TILES // shares, (1, 0) if run.objective == "mae" else (2, 3)

        def tiles(step: int) -> list[tuple[Any, int]]:
            whole = tile_objectives.batch(TILES, views, seed=step, larger=run.objective == "dinov3")
            return [(tile_objectives.part(whole, i * each, (i + 1) * each), i * each) for i in mine]

        return tiles
    store = EmbeddingStore.open(folder / "embeddings")
    settings: dict[str, Any] = {
        "batch_size": 16,
        "batch_tokens": None,
        "lanes": 8,
        "seed": 0,
        "field_cells": 0,
        "validation_fraction": 0.0,
        "crop": 0.875,
        "shift_grid": 10,
        "flip": 0.5,
        "mask": "random",
        "mask_ratio": 0.75,
        "block_cells": 3,
        # As another tile encoder's: the same, standardised otherwise.
        "further": [(store, Statistics(np.zeros(16), np.full(16, 2.0), 1))] if run.objective == "slide_context" else [],
    }
    sequences: SlideSequences = (
        CropSequences(store, Statistics.of(store), **settings, **CROPS)
        if run.objective == "slide_ibot"
        else SlideSequences(store, Statistics.of(store), **settings)
    )

    def slides(step: int) -> list[tuple[Any, int]]:
        parts = [sequences.batch(step, i, shares) for i in mine]
        return [(part, part.positions[0] - sequences.packing.start(step)) for part in parts]

    return slides


def backward(loss: Tensor) -> None:
    loss.backward()


# Tasks: each is called on every process of its group, with the folder
# --------------------------------------------------


@dataclass(frozen=True)
class Train:
    """The steps that `Training` takes, without Lightning around them."""

    run: Run
    optim: Optim

    def __call__(self, folder: Path) -> Outcome | None:
        objective, of, optim = built(self.run), micro_batches(self.run, folder), self.optim
        optimiser = torch.optim.AdamW(parameter_groups(objective.trained(), optim), lr=0.0, fused=True)
        losses, norms = [], []
        for step in range(STEPS):
            moment = Moment(step, STEPS, seed=5)
            set_rates(optimiser, optim.lr, optim.weight_decay, last_layer_frozen=step < 2)
            optimiser.zero_grad()
            figures = gradients(objective, of(step), moment, backward)
            norms.append(
                [
                    clip(network.parameters(), optim.clip, optim.clip_each).item()
                    for network in objective.trained().values()
                ]
            )
            optimiser.step()
            objective.after_step(moment)
            losses.append(total(figures["loss"]).item() / world_size())
        weights = {name: whole(value) for name, value in objective.state_dict().items()}
        return Outcome(losses, norms, weights) if dist.get_rank() == 0 else None


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


class Forgetful(Objective):
    """One network, whose ``initialise`` leaves out part of its only bias: on two processes, the part of the second."""

    class Network(nn.Linear):
        def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
            (tensor if name == "weight" else tensor[:3]).fill_(0.5)

    def __init__(self, where: str) -> None:
        super().__init__()
        self.network = self.Network(4, 4) if where == "network" else tile_objectives.encoder()()
        if where == "buffer":
            self.register_buffer("centre", torch.zeros(2))

    def trained(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def loss(self, batch: Any, moment: Moment) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Forget:
    """What is said about an objective that leaves a tensor without a value."""

    world: int
    where: str

    def __call__(self, _: Path) -> str:
        with torch.device("meta"):
            objective = Forgetful(self.where)
        shard(objective, lay_mesh("cpu", self.world, None), "float32")
        try:
            materialise(objective, CPU, seed=0)
        except Fault as fault:
            return str(fault)
        return "nothing"


def types(folder: Path) -> dict[str, Any]:
    """A bf16 step on two processes: the types of everything, and whether gradients have digits that bf16 hasn't."""
    run = Run("rotary", 2, precision="bf16")
    objective = built(run)
    names = ("input", "weight", "output", "teacher", "features", "angles")
    seen: dict[str, set[torch.dtype]] = {name: set() for name in names}

    def look_at_angles(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["angles"] |= {table.dtype for turns in inputs[4] for table in (turns.cos, turns.sin)}

    def look(linear: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen["input"].add(inputs[0].dtype)
        seen["weight"].add(linear.weight.dtype)
        seen["output"].add(output.dtype)

    objective.student.encoder.blocks[1].mlp.fc1.register_forward_hook(look)  # type: ignore[union-attr, index]
    objective.student.encoder.blocks[1].register_forward_pre_hook(look_at_angles)  # type: ignore[union-attr, index]
    objective.teacher.encoder.blocks[1].register_forward_hook(lambda *a: seen["teacher"].add(a[2].dtype))  # type: ignore[union-attr, index]
    objective.student.encoder.register_forward_hook(lambda *a: seen["features"].add(a[2][0].cls.dtype))  # type: ignore[union-attr]
    optimiser = torch.optim.AdamW(objective.student.parameters(), lr=1e-3)  # type: ignore[union-attr]
    gradients(objective, micro_batches(run, folder)(0), Moment(0, 1, seed=5), backward)
    optimiser.step()
    found = [p.grad.to_local() for p in objective.student.parameters() if p.grad is not None]  # type: ignore[union-attr]
    digits = [float((g.bfloat16().float() != g).float().mean()) for g in found if g.numel()]
    return seen | {
        "masters": {p.dtype for p in objective.parameters()},
        "gradients": {g.dtype for g in found},
        "moments": {state[key].dtype for state in optimiser.state.values() for key in ("exp_avg", "exp_avg_sq")},
        "buffers": {b.dtype for b in objective.buffers()},
        "with more digits": sum(digits) / len(digits),
    }


def teacher_after_forward(folder: Path) -> list[str]:
    """The teacher's parameters that are still gathered after it has seen a batch."""
    run = Run("dinov2", 2)
    objective, moment = built(run), Moment(0, 1, seed=5)
    objective.prepare([part for part, _ in micro_batches(run, folder)(0)], moment)
    return [name for name, p in objective.named_parameters() if "teacher" in name and not isinstance(p, DTensor)]


@dataclass(frozen=True)
class MaskedOnFirst:
    """Loss and norms of a step whose masked patches are all in the global batch's first quarter."""

    world: int
    accumulate: int

    def __call__(self, folder: Path) -> list[float]:
        run = Run("dinov2", self.world, accumulate=self.accumulate)
        objective = built(run)
        parts = []
        for part, first in micro_batches(run, folder)(0):
            masks = part.masks.unflatten(0, (2, -1)).clone()
            masks[:, max(0, TILES // 4 - first) :] = False
            parts.append((replace(part, masks=masks.flatten(0, 1)), first))
        figures = gradients(objective, parts, Moment(0, 1, seed=5), backward)
        norms = [clip(network.parameters(), 1.0).item() for network in objective.trained().values()]
        return [total(figures["ibot"]).item() / world_size(), *norms]


def process(rank: int, folder: Path, tasks: list[tuple[int, Callable[[Path], Any]]]) -> None:
    torch.set_num_threads(1)
    for number, (world, task) in enumerate(tasks):
        if rank < world:
            where = f"file://{folder / f'meeting-{number}'}"
            # Long: who isn't needed for a while waits here.
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=timedelta(hours=1))
            torch.save(task(folder), folder / f"{number}-{rank}.pt")
            dist.destroy_process_group()


if __name__ == "__main__":
    here = Path(sys.argv[1])
    mp.start_processes(process, (here, pickle.loads((here / "tasks.pkl").read_bytes())), PROCESSES, start_method="fork")
