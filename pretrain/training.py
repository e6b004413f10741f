"""The training loop of both stages: Lightning starts the processes and walks the batches; the step is written out here.

    for each micro-batch: objective.loss → backward
    clip each network → (skip the step if anything is not finite) → AdamW → teacher, centre → record → maybe checkpoint

All a resumed run needs beside networks and optimiser is the number of steps taken: data, schedules and random draws are
functions of it.
"""

import logging
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from data.fault import Fault
from pretrain import checkpoints, run_folder
from pretrain.across_ranks import total, world_size
from pretrain.losses.precision import wide
from pretrain.objective import Moment, Objective
from pretrain.optimisation import Optim, clip, parameter_groups, scaled_lr, set_rates
from pretrain.progress import Progress, duration, say
from pretrain.record import Record, Wandb
from pretrain.schedules import cosine
from pretrain.sharding import ShardedStrategy, materialise, shard


@dataclass
class Hardware:
    """The settings under ``trainer:``, explained in ``configs/trainer/default.yaml``."""

    accelerator: str
    devices: int
    nodes: int
    shard_size: int | None
    precision: str
    activation_checkpointing: str
    compile: bool
    accumulate: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int


class Training(L.LightningModule, ABC):
    """One run of one objective in one folder. A stage says where its batches come from and what to do with one."""

    unit = "samples"

    def __init__(self, run: Path, config: Any, make_objective: Callable[[], Objective], batch_size: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.run, self.config, self.make_objective, self.batch_size = run, config, make_objective, batch_size
        self.optim: Optim = config.optim
        self.hardware: Hardware = config.trainer
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.objective: Objective = None  # type: ignore[assignment]  # configure_model builds it, in the run's processes
        self.taken = batch_size  # samples in the present step; a stage whose steps differ says so in before_step
        self._ended = time.monotonic()

    # What a stage adds -----------------------------------------------------------------------------------------

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterable[Any]:
        """This rank's share of the global batches ``start … stop − 1``; an item that is a Fault is raised."""

    @abstractmethod
    def micro_batches(self, batch: Any) -> Iterable[tuple[Any, int]]:
        """A batch's micro-batches on the device, each with the number of its first sample in the global batch."""

    def before_step(self, batch: Any) -> dict[str, float]:
        """Look at a batch before it is used (count bad tiles, say); figures to record. Every rank calls it."""
        return {}

    def begin(self, objective: Objective) -> None:
        """Change the trained networks' first values, where a run begins; a resumed run has its own."""

    def evaluate(self) -> dict[str, float]:
        """Figures of held-out data, asked for at every checkpoint."""
        return {}

    # What Lightning calls --------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.objective is not None:
            return
        with torch.device("meta"):
            objective = self.make_objective()
        assert self.device_mesh is not None
        hardware = self.hardware
        shard(objective, self.device_mesh, hardware.precision, hardware.activation_checkpointing, hardware.compile)
        begin = self.begin if checkpoints.newest(self.run) is None else None
        materialise(objective, self.trainer.strategy.root_device, self.config.seed, begin)
        self.objective = objective

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.objective.trained(), self.optim)
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.optim.betas[0], self.optim.betas[1]), fused=True)

    def on_fit_start(self) -> None:
        hash_ = run_folder.open_run(self.run, self.config, self.global_rank == 0)
        newest = checkpoints.newest(self.run)
        if newest is not None:
            self._check_data(newest)
            state = checkpoints.load(newest, self.objective, self._optimiser())
            self.step, self.skipped = state["step"], state["skipped"]
        self.hash = hash_
        self.record = Record(self.run, self.step) if self.global_rank == 0 else None
        self.wandb = Wandb(self.run, self.config) if self.global_rank == 0 else None
        self.progress = Progress(self.optim.steps, self.run.name, "steps", self.step) if self.global_rank == 0 else None

    def train_dataloader(self) -> Iterable[Any]:
        return self.batches(self.step, self.optim.steps)

    def training_step(self, batch: Any, _: int) -> None:
        if isinstance(batch, Fault):
            raise batch
        began = time.monotonic()
        seen = self.before_step(batch)
        figures, took_step = self._step(batch)
        figures |= seen
        self.step += 1
        now = time.monotonic()
        figures |= {
            f"{self.unit}_per_second": self.taken / (now - self._ended),
            "data_wait": (began - self._ended) / (now - self._ended),
        }
        self._ended = now
        if self.step % self.hardware.log_every == 0 or self.step == self.optim.steps or not took_step:
            self._log(figures)
        if self.progress:
            self.progress.advance(1, f"loss {figures['loss']:.4f}")

    def on_train_batch_end(self, *_: Any) -> None:
        if self.step % self.hardware.checkpoint_every == 0 or self.step == self.optim.steps:
            if figures := self.evaluate():
                self._log(figures)
            self.save()
            self._ended = time.monotonic()  # saving is not waiting for data

    def on_fit_end(self) -> None:
        if self.progress:
            self.progress.close()
        if self.wandb:
            self.wandb.close()

    def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
        return batch  # a stage moves a micro-batch when its turn comes

    # The step --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Publish a checkpoint of this moment."""
        state = {"skipped": self.skipped, "config": self.hash, "data": self.data_digest()}
        checkpoints.save(self.run, self.step, self.objective, self._optimiser(), state, self.hardware.keep_checkpoints)

    def data_digest(self) -> str:
        """A hash of the data that the run reads."""
        return ""

    def _check_data(self, checkpoint: Path) -> None:
        if checkpoints.read_state(checkpoint)["data"] != self.data_digest():
            raise Fault(
                f"the data is not what {self.run} was trained on until now: shards or embeddings were added to or remade; "
                f"put them back as they were, or give another run=."
            )

    def _step(self, batch: Any) -> tuple[dict[str, float], bool]:
        objective, optim, optimiser = self.objective, self.optim, self._optimiser()
        steps = optim.schedule_steps or optim.steps
        lr = cosine(
            self.step,
            peak=scaled_lr(optim, self.batch_size),
            final=optim.lr_final,
            total=steps,
            warmup=optim.warmup_steps,
        )
        weight_decay = cosine(self.step, peak=optim.weight_decay, final=optim.weight_decay_final, total=steps)
        set_rates(
            optimiser,
            lr,
            weight_decay,
            self.step < optim.frozen_last_layer_steps,
            self.step < optim.frozen_backbone_steps,
        )
        optimiser.zero_grad()
        moment = Moment(self.step, steps, self.config.seed)
        sums = gradients(objective, list(self.micro_batches(batch)), moment, self.manual_backward)
        norms = {
            f"grad_norm/{name}": clip(network.parameters(), optim.clip) for name, network in objective.trained().items()
        }
        means = total(torch.stack(list(sums.values()))) / world_size()
        values = dict(zip([*sums, *norms], torch.cat([means, torch.stack(list(norms.values()))]).tolist(), strict=True))
        finite = all(math.isfinite(value) for value in values.values())
        if finite:
            self.optimizers().step()  # type: ignore[union-attr]  # through Lightning, which counts it
            objective.after_step(moment)
            self.skipped_in_a_row = 0
        else:
            objective.after_skip()
            self._skip(values)
        values["grad_norm"] = math.sqrt(sum(values[name] ** 2 for name in norms))
        return values | {"lr": lr, "weight_decay": weight_decay, "skipped": self.skipped}, finite

    def _skip(self, values: dict[str, float]) -> None:
        """Count a step that was not taken; stop where too many come in a row. Every rank sees the same values."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        culprits = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        if self.global_rank == 0:
            say(f"step {self.step} skipped: {culprits} not finite ({self.skipped_in_a_row} in a row)")
        if self.skipped_in_a_row > self.optim.max_skipped:
            raise Fault(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite ({culprits}), more than "
                f"optim.max_skipped={self.optim.max_skipped}; the last checkpoint is good: lower optim.lr, or look at the data."
            )

    def _optimiser(self) -> torch.optim.Optimizer:
        return self.optimizers().optimizer  # type: ignore[union-attr, return-value]

    def _log(self, figures: dict[str, float]) -> None:
        if self.record and self.wandb:
            self.record.add(self.step, figures)
            self.wandb.add(self.step, figures)


def gradients(
    objective: Objective, parts: Sequence[tuple[Any, int]], moment: Moment, backward: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    """Forward and backward of a step's micro-batches, each with the number of its first sample in the global batch.

    The gradients are those of the mean loss over micro-batches and ranks; they are reduced over ranks once, in the last
    backward. Returns this rank's mean loss and figures, scalars of at least float32.
    """
    means: dict[str, Tensor] = {}
    prepared = objective.prepare([part for part, _ in parts], moment)
    for i, (part, (_, first)) in enumerate(zip(prepared, parts, strict=True)):
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(i == len(parts) - 1, recurse=False)
        loss, figures = objective.loss(part, replace(moment, first=first))
        backward(loss / len(parts))
        for name, value in {"loss": loss, **figures}.items():
            means[name] = means.get(name, 0.0) + wide(value.detach()).to(loss.device) / len(parts)
    return means


def fit(training: Training) -> None:
    """Run ``training`` to its last step, resuming from its newest checkpoint; says so where nothing is left to do."""
    newest = checkpoints.newest(training.run)
    if newest is not None and checkpoints.read_state(newest)["step"] >= training.optim.steps:
        run_folder.open_run(training.run, training.config, first_rank=False)
        training._check_data(newest)
        say(f"{training.run} is done: {training.optim.steps} steps, checkpoint {newest}")
        return
    hardware = training.hardware
    _quieten_lightning()
    trainer = L.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.nodes,
        strategy=ShardedStrategy(hardware.shard_size),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=training.run,
    )
    if newest is not None and trainer.global_rank == 0:
        say(f"{training.run}: resuming after step {checkpoints.read_state(newest)['step']} of {training.optim.steps}")
    began = time.monotonic()
    trainer.fit(training)
    if trainer.is_global_zero:
        say(
            f"{training.run}: {training.step} steps in {duration(time.monotonic() - began)}, checkpoint {checkpoints.newest(training.run)}"
        )


def _quieten_lightning() -> None:
    """What Lightning and FSDP say at start-up is about defaults that are not used here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*IterableDataset.*",
        ".*LeafSpec.*",
        ".*returned a view tensor.*",
    ):
        warnings.filterwarnings("ignore", pattern)
