"""A run as Lightning's module: its networks, its optimiser, and the step, written out.

    for each micro-batch: objective.loss → backward
    clip each network → (skip the step if anything is not finite) → AdamW → teacher, centre → record

What happens around a step lies in callbacks, in this order after each: a signal is heeded (`ending`), features are
looked at (`looking`), held-out data judge (`judging`), the user's own callbacks are called, alarms are raised
(`alarming`), a checkpoint is written (`checkpointing`), and progress is shown (`showing`).

All a resumed run needs beside networks and optimiser is the number of steps taken: data, schedules and random draws are
functions of it.
"""

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch

from data.fault import Fault
from data.fused import fusing
from data.lease import SILENCE, Lease
from data.loader_process import SHARED_MEMORY, LoaderProcess
from data.redaction import redacted_settings
from pretrain.objectives.contract import require_trainable
from pretrain.objectives.interface import Moment, Objective
from pretrain.run import checkpoints, signals
from pretrain.run import folder as run_folder
from pretrain.run.across_ranks import total, world_size
from pretrain.run.counted import counted_as
from pretrain.run.history import known_facts
from pretrain.run.preemption import Preemption
from pretrain.run.progress import SECONDS_BETWEEN_LINES, Progress, say
from pretrain.run.record import RunLogger
from pretrain.run.watchdog import Watchdog
from pretrain.training.adamw import ShardAdamW
from pretrain.training.even_shares import require_even
from pretrain.training.gradients import gradients, not_finite
from pretrain.training.optimisation import Optim, clip, parameter_groups, rates_at, set_rates
from pretrain.training.sharding import materialise, shard
from pretrain.training.trainer_settings import TrainerSettings
from pretrain.training.utilisation import operations_of_step, peak_memory, silent_about_operations
from pretrain.training.watching import Watch

T = TypeVar("T")


class Training(L.LightningModule, ABC):
    """One run of one objective in one folder. A stage says where its batches come from and what to do with one."""

    unit = "samples"
    data_may_have = "shards or embeddings were added to or remade"  # where their digest is another
    score = ""  # the figure of `evaluate` by which the best checkpoint is told; higher is better

    def __init__(self, run: Path, config: Any, make_objective: Callable[[], Objective], batch_size: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        require_even(config, config.trainer.devices * config.trainer.nodes)
        self.run, self.config, self.make_objective, self.batch_size = run, config, make_objective, batch_size
        self.optim: Optim = config.optim
        self.settings: TrainerSettings = config.trainer
        self.watch: Watch = config.watch
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.asked: signal.Signals | None = None  # what asked this run to end early
        self.loader: LoaderProcess | None = None
        self.lease: Lease | None = None
        self.objective: Objective = None  # type: ignore[assignment]  # configure_model builds it, in the run's processes
        self.taken = batch_size  # samples in the present step; a stage whose steps differ says so in before_step
        self.sharing = 1  # processes that share a sample
        self.peak: float | None = None  # operations a second of a process's device, where they are to be recorded
        self.operations = 0.0  # of the present step, the mean over processes
        self.facts = known_facts({}, 0, {}, {})  # until the objective is there
        self.raised: set[str] = set()  # names of alarms: each is said once in the run's life
        self.scored: list[tuple[int, float]] = []  # (step, score) of each checkpoint
        self.watchdog = Watchdog(self.settings.stalled_minutes)
        self._ended = time.monotonic()
        newest = checkpoints.newest(run)
        if newest is None or checkpoints.step_of(newest) < self.optim.steps:
            self.objective_without_numbers()  # what can't be built, or had (a teacher), is said before the data is read

    # What a stage adds -----------------------------------------------------------------------------------------

    @abstractmethod
    def batches(self, start: int, stop: int) -> LoaderProcess:
        """A process that makes this rank's share of the global batches ``start … stop − 1``; an item that is a Fault is
        raised."""

    @abstractmethod
    def micro_batches(self, batch: Any) -> Iterable[tuple[Any, int]]:
        """A batch's micro-batches on the device, each with the number of its first sample in the global batch."""

    def before_step(self, batch: Any) -> dict[str, float]:
        """Look at a batch before it is used; what to count of it (bad tiles, say), to be summed over ranks with the
        losses, in one exchange."""
        return {}

    def after_step(self, counts: dict[str, int]) -> dict[str, float]:
        """Called with the counts of all ranks, once the step is taken; figures to record. Every rank calls it, and all
        get the same."""
        return dict(counts)

    def begin(self, objective: Objective) -> None:
        """Change the trained networks' first values, where a run begins; a resumed run has its own."""

    def look(self, batch: Any) -> dict[str, float]:
        """Figures that are too costly for every step, of the batch that was just used; every rank calls it."""
        return {}

    def evaluate(self) -> dict[str, float]:
        """Figures of held-out data, asked for at every checkpoint."""
        return {}

    def evaluate_first(self) -> dict[str, float]:
        """Figures of the first weights that later ones are compared with, asked for before the first step."""
        return {}

    def keep_for_replay(self) -> None:
        """Keep what it takes to compute the step again that was just skipped; every rank calls it."""

    def position(self) -> int:
        """Samples of the stream that were taken until now; a function of the step, as everything about the data is."""
        return self.step * self.batch_size

    def data_digest(self) -> str:
        """A hash of the data that the run reads."""
        return ""

    # What Lightning calls --------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.objective is not None:
            return
        objective = self.objective_without_numbers()
        if self.peak and (silent := silent_about_operations(objective)):
            self.peak = None
            if self.global_rank == 0:
                say(f"{self.run}: no flop_utilisation, since {', '.join(silent)} has no method operations() of its own")
        assert self.device_mesh is not None
        settings = self.settings
        shard(objective, self.device_mesh, settings.precision, settings.activation_checkpointing, settings.compile)
        begin = self.begin if checkpoints.newest(self.run) is None else None
        materialise(objective, self.trainer.strategy.root_device, self.config.seed, begin, self.make_objective)
        self.objective = objective
        self.facts = known_facts(
            objective.prototype_counts(),
            self.optim.warmup_steps,
            objective.chance_losses,
            run_folder.flat(asdict(self.config)),
        )

    def objective_without_numbers(self) -> Objective:
        """The objective on the meta device. Raises Fault for one that can't be built or trained."""
        with torch.device("meta"):
            objective = self.make_objective()
        require_trainable(objective)
        return objective

    def configure_optimizers(self) -> ShardAdamW:
        groups = parameter_groups(self.objective.trained(), self.optim)
        return ShardAdamW(groups, lr=0.0, betas=(self.optim.betas[0], self.optim.betas[1]), fused=True)

    def on_fit_start(self) -> None:
        first, givens = self.global_rank == 0, self.objective.rests_on()
        self.hash = run_folder.open_run(self.run, self.config, first, self.data_digest(), givens)
        self.software = run_folder.software()
        newest = self.began_from = checkpoints.newest(self.run)
        if newest is not None:
            self.require_same_data(newest)
            self.require_same_givens(newest)
            if first:
                say(f"{self.run}: resuming after step {checkpoints.step_of(newest)} of {self.optim.steps}")
            state = checkpoints.restore(newest, self.objective, self.optimiser)
            self.step, self.skipped = state["step"], state["skipped"]
            self.raised, self.scored = set(state["alarms"]), [(step, score) for step, score in state["scores"]]
        # What is logged through Lightning, or by its trainer.global_step, belongs to a step of the run as the record
        # counts it: 1 is the first, and a start is none.
        loop = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = self.step + 1
        loop.manual_optimization.optim_step_progress.total.completed = self.step
        self.preemption = Preemption()

    def train_dataloader(self) -> LoaderProcess:
        self.loader = self.batches(self.step, self.optim.steps)
        if self.loader.through_pipe and self.global_rank == 0:
            say(
                f"{self.run}: {SHARED_MEMORY} has no room for the batches on their way, so they go through a pipe,"
                " which is slower"
            )
        return self.loader

    def training_step(self, batch: Any, _: int) -> dict[str, Any]:
        if isinstance(batch, Fault):
            raise batch
        if self.lease and self.lease.lost:
            raise Fault(
                f"{self.run} was taken over by another job, since nothing was heard of this one for {SILENCE:.0f} s (a"
                " stopped process, or a disk that didn't answer): this one ends, and has written nothing since."
            )
        began = time.monotonic()
        with fusing(torch.compile if self.fuses else None):
            figures, counts, took_step = self._step(batch, self.before_step(batch))
        figures |= self.after_step(counts)
        self.step += 1
        now = time.monotonic()
        figures |= {
            f"{self.unit}_per_second": self.taken / (now - self._ended),
            "data_wait": (began - self._ended) / (now - self._ended),
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        if self.peak:
            figures["flop_utilisation"] = self.operations / (now - self._ended) / self.peak
        self._ended = now
        self.watchdog.beat()
        if self.step % self.settings.log_every == 0 or self.is_last or not took_step:
            self.record(figures)
        self.require_some_steps_taken(figures)
        return figures | {"loss": torch.tensor(figures["loss"])}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        if self.is_due or self.looks_now:  # after the callbacks
            self.watchdog.beat()
            self._ended = time.monotonic()  # neither a look nor an evaluation is waiting for data

    def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
        return batch  # a stage moves a micro-batch when its turn comes

    # What callbacks ask ----------------------------------------------------------------------------------------

    @property
    def is_last(self) -> bool:
        """Whether the step just taken is the run's last."""
        return self.step == self.optim.steps

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is due after the step just taken."""
        every = (self.settings.checkpoint_every, self.settings.keep_every)
        return self.is_last or any(steps and self.step % steps == 0 for steps in every)

    @property
    def looks_now(self) -> bool:
        """Whether features are looked at after the step just taken."""
        return bool(self.watch.every) and self.step % self.watch.every == 0

    @property
    def fuses(self) -> bool:
        """Whether losses, targets and augmentation are compiled beside the blocks: not on a CPU, where they are small
        and the minute that it takes to compile them is never got back."""
        return self.settings.compile and self.device.type == "cuda"

    @property
    def optimiser(self) -> ShardAdamW:
        """The one there is."""
        return self.optimizers().optimizer  # type: ignore[union-attr, return-value]

    def record(self, figures: dict[str, float]) -> None:
        """Give the figures of the present step to every logger."""
        for logger in self.trainer.loggers:
            (logger.record if isinstance(logger, RunLogger) else logger.log_metrics)(figures, self.step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint of this moment holds beside networks and optimiser."""
        return {
            "samples": self.position(),
            "skipped": self.skipped,
            "alarms": sorted(self.raised),
            "scores": self.scored,
            "config": self.hash,
            "data": self.data_digest(),
            "rests_on": dict(self.objective.rests_on()),
            "settings": redacted_settings(asdict(self.config)),
            **self.software,
        }

    def heeding(self, batches: Iterable[T], total: int) -> Iterator[T]:
        """``batches`` of an evaluation, as many on every rank, with progress shown; a signal ends it with
        `signals.Asked`."""
        progress = (
            Progress(total, f"{self.run.name}: evaluation at step {self.step}", "batches")
            if self.global_rank == 0
            else None
        )
        try:
            for batch in batches:
                yield batch
                self.watchdog.beat()
                if progress:
                    progress.advance()
                if asked := self.preemption.asked():
                    raise signals.Asked(asked)
        finally:
            if progress and time.monotonic() - progress.started > SECONDS_BETWEEN_LINES:
                progress.close()

    def require_same_data(self, checkpoint: Path) -> None:
        """Raise Fault where the data isn't that of ``checkpoint``, or say so where changes are allowed."""
        if checkpoints.read_state(checkpoint)["data"] != self.data_digest():
            now = f"the data is not what {self.run} was trained on until now: {self.data_may_have}"
            self.require_allowed_change(now, ", at its place in their order")

    def require_same_givens(self, checkpoint: Path) -> None:
        """Raise Fault where what the objective rests on isn't what it rested on in ``checkpoint``, or say so where
        changes are allowed."""
        before = run_folder.givens_of(checkpoints.read_state(checkpoint))
        if other := [name for name, digest in self.objective.rests_on().items() if before.get(name) != digest]:
            named = run_folder.flat(asdict(self.config))
            others = ", ".join(f"{name}={named[name]}" if name in named else name for name in other)
            now = f"{others} holds other weights than {self.run} has learned from until now"
            self.require_allowed_change(now)

    def require_allowed_change(self, now: str, how: str = "") -> None:
        """Raise Fault for what the run was begun on and is no more, in the words ``now``, or say it where changes are
        allowed."""
        if not self.config.allow_changes:
            raise Fault(
                f"{now}; put them back as they were, or give another run=, or allow_changes=true to go on with these."
            )
        if self.global_rank == 0:
            say(f"{now}; it goes on with these{how}")

    # The step --------------------------------------------------------------------------------------------------

    def _step(self, batch: Any, counted: dict[str, float]) -> tuple[dict[str, float], dict[str, int], bool]:
        """Take a step: its figures, the sums over ranks of what this one ``counted``, and whether it was taken."""
        objective, optim, optimiser = self.objective, self.optim, self.optimiser
        steps = optim.schedule_steps or optim.steps
        lr, weight_decay = rates_at(self.step, optim, self.batch_size)
        set_rates(
            optimiser,
            lr,
            weight_decay,
            self.step < optim.frozen_last_layer_steps,
            self.step < optim.frozen_backbone_steps,
        )
        optimiser.zero_grad()
        moment = Moment(self.step, steps, self.config.seed)
        parts = list(self.micro_batches(batch))
        sums = gradients(objective, parts, moment, self.manual_backward)
        if self.peak:
            passed = operations_of_step(objective, [part for part, _ in parts], self.settings.activation_checkpointing)
            counted = counted | {"operations": passed / self.sharing}
        norms = {
            f"grad_norm/{name}": clip(network.parameters(), optim.clip, optim.clip_each)
            for name, network in objective.trained().items()
        }
        some = next(iter(sums.values()))
        counts = [torch.full_like(some, value) for value in counted.values()]
        everywhere = total(torch.stack([*sums.values(), *counts]))  # one exchange between ranks
        figures = torch.cat([everywhere[: len(sums)] / world_size(), torch.stack(list(norms.values()))])
        decisive = torch.cat([figures[list(sums).index("loss")].view(1), figures[len(sums) :]])  # others are to be seen
        # The optimiser is told on the device whether to take the step. To ask first would leave the device idle while
        # the optimiser's kernels are being launched.
        optimiser.found_inf = (~decisive.isfinite().all()).float()
        self.optimizers().step()  # type: ignore[union-attr]  # through Lightning, which counts it
        numbers = torch.cat([figures, everywhere[len(sums) :]]).tolist()  # the one wait of a step
        values = dict(zip([*sums, *norms], numbers, strict=False))
        found = dict(zip(counted, numbers[len(values) :], strict=True))
        self.operations = found.pop("operations", 0.0) / world_size()
        finite = all(math.isfinite(values[name]) for name in ("loss", *norms))
        if finite:
            objective.after_step(moment)
            self.skipped_in_a_row = 0
        else:
            objective.after_skip()
            self._skip(values)
        values["grad_norm"] = math.sqrt(sum(values[name] ** 2 for name in norms))
        values |= {"lr": lr, "weight_decay": weight_decay, "skipped": self.skipped}
        return values, {name: round(count) for name, count in found.items()}, finite

    def _skip(self, values: dict[str, float]) -> None:
        """Count a step that was not taken. Every rank sees the same values."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        culprits = ", ".join(not_finite(values))
        if self.global_rank == 0:
            say(f"step {self.step + 1} skipped: {culprits} not finite ({self.skipped_in_a_row} in a row)")
        self.keep_for_replay()

    def require_some_steps_taken(self, figures: dict[str, float]) -> None:
        """Raise Fault where more steps in a row were skipped than ``optim.max_skipped``."""
        if self.skipped_in_a_row > self.optim.max_skipped:
            culprits = ", ".join(not_finite(figures))
            raise Fault(
                f"{counted_as(self.skipped_in_a_row, 'step')} in a row had a loss or gradient that is not finite"
                f" ({culprits}), more than optim.max_skipped={self.optim.max_skipped}; {checkpoints.words_for_newest(self.run)}: go on with a"
                " lower optim.lr and allow_changes=true, or look at the data."
            )
