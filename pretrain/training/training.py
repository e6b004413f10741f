"""The training loop of both stages: Lightning starts the processes and walks the batches; the step is written out here.

    for each micro-batch: objective.loss → backward
    clip each network → (skip the step if anything is not finite) → AdamW → teacher, centre → record → maybe checkpoint

All a resumed run needs beside networks and optimiser is the number of steps taken: data, schedules and random draws are
functions of it.
"""

import logging
import math
import resource
import signal
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from data.fault import Fault
from data.lease import SILENCE, Lease
from data.loader_process import SHARED_MEMORY, LoaderProcess, ended_by, open_more_files
from data.redaction import redacted_settings
from models.allowed import one_of, within
from pretrain.objectives.contract import loss_of, require_trainable
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.losses.precision import wide
from pretrain.objectives.schedules import cosine
from pretrain.run import alarms, best, checkpoints, preemption, signals
from pretrain.run import folder as run_folder
from pretrain.run import metrics as metrics_file
from pretrain.run.across_ranks import total, world_size
from pretrain.run.launched import rank
from pretrain.run.preemption import Preemption
from pretrain.run.progress import SECONDS_BETWEEN_LINES, Progress, duration, say
from pretrain.run.record import Record, Wandb
from pretrain.run.saving import Saver
from pretrain.run.watchdog import Watchdog
from pretrain.settings.hardware import peak_of
from pretrain.training.even_shares import require_even
from pretrain.training.optimisation import Optim, clip, parameter_groups, scaled_lr, set_rates
from pretrain.training.sharding import CHECKPOINTING, PRECISIONS, ShardedStrategy, materialise, shard
from pretrain.training.watching import Watch

T = TypeVar("T")


@dataclass
class Hardware:
    """The settings under ``trainer:``, explained in ``configs/trainer/default.yaml``."""

    accelerator: Annotated[str, one_of("auto", "cpu", "gpu")]
    devices: Annotated[int, within(least=1)]
    nodes: Annotated[int, within(least=1)]
    shard_size: Annotated[int | None, within(least=1)]
    precision: Annotated[str, one_of(*PRECISIONS)]
    activation_checkpointing: Annotated[str, one_of(*CHECKPOINTING)]
    compile: bool
    accumulate: Annotated[int, within(least=1)]
    peak_tflops: Annotated[float | None, within(above=0)]
    log_every: Annotated[int, within(least=1)]
    checkpoint_every: Annotated[int, within(least=0)]
    keep_checkpoints: Annotated[int, within(least=0)]
    keep_every: Annotated[int | None, within(least=1)]
    stalled_minutes: Annotated[float | None, within(above=0, most=100_000)]


class Training(L.LightningModule, ABC):
    """One run of one objective in one folder. A stage says where its batches come from and what to do with one."""

    unit = "samples"
    score = ""  # the figure of `evaluate` by which the best checkpoint is told; higher is better

    def __init__(self, run: Path, config: Any, make_objective: Callable[[], Objective], batch_size: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        require_even(config, config.trainer.devices * config.trainer.nodes)
        self.run, self.config, self.make_objective, self.batch_size = run, config, make_objective, batch_size
        self.optim: Optim = config.optim
        self.hardware: Hardware = config.trainer
        self.step = self.skipped = self.skipped_in_a_row = self.failed_saves = 0
        self.ended_early = self.requeued = False
        self.asked: int = 0  # the signal that ended it early
        self.loader: LoaderProcess | None = None
        self.lease: Lease | None = None
        self.objective: Objective = None  # type: ignore[assignment]  # configure_model builds it, in the run's processes
        # Samples in the present step, and tiles of all processes; a stage whose steps differ says so in before_step.
        self.taken = self.tiles_taken = batch_size
        self.peak: float | None = None  # operations a second that all devices together can do, where known,
        self.tile_operations = 0.0  # and then those that a tile costs
        self.watch: Watch = config.watch
        self.facts = alarms.known_facts({}, 0)  # until the objective is there
        self.raised: set[str] = set()  # names of alarms: each is said once in the run's life
        self.scored: list[tuple[int, float]] = []  # (step, score) of each checkpoint
        self._ended = time.monotonic()
        self.watchdog = Watchdog(self.hardware.stalled_minutes)

    # What a stage adds -----------------------------------------------------------------------------------------

    @abstractmethod
    def batches(self, start: int, stop: int) -> LoaderProcess:
        """A process that makes this rank's share of the global batches ``start … stop − 1``; an item that is a Fault is raised."""

    @abstractmethod
    def micro_batches(self, batch: Any) -> Iterable[tuple[Any, int]]:
        """A batch's micro-batches on the device, each with the number of its first sample in the global batch."""

    def before_step(self, batch: Any) -> dict[str, float]:
        """Look at a batch before it is used (count bad tiles, say); figures to record. Every rank calls it."""
        return {}

    def begin(self, objective: Objective) -> None:
        """Change the trained networks' first values, where a run begins; a resumed run has its own."""

    def look(self, batch: Any) -> dict[str, float]:
        """Figures that are too costly for every step, of the batch that was just used; every rank calls it."""
        return {}

    def evaluate(self) -> dict[str, float]:
        """Figures of held-out data, asked for at every checkpoint."""
        return {}

    # What Lightning calls --------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.objective is not None:
            return
        with torch.device("meta"):
            objective = self.make_objective()
        require_trainable(objective)
        assert self.device_mesh is not None
        hardware = self.hardware
        shard(objective, self.device_mesh, hardware.precision, hardware.activation_checkpointing, hardware.compile)
        begin = self.begin if checkpoints.newest(self.run) is None else None
        materialise(objective, self.trainer.strategy.root_device, self.config.seed, begin, self.make_objective)
        self.objective = objective
        self.facts = alarms.known_facts(objective.prototype_counts(), self.optim.warmup_steps)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.objective.trained(), self.optim)
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.optim.betas[0], self.optim.betas[1]), fused=True)

    def on_fit_start(self) -> None:
        self.hash = run_folder.open_run(self.run, self.config, self.global_rank == 0, self.data_digest())
        self.software = run_folder.software()
        newest = self.began_from = checkpoints.newest(self.run)
        if newest is not None:
            self._check_data(newest)
            state = checkpoints.restore(newest, self.objective, self._optimiser())
            self.step, self.skipped = state["step"], state["skipped"]
            self.raised, self.scored = set(state["alarms"]), [(step, score) for step, score in state["scores"]]
        self.saver = Saver(self.run, self.hardware.keep_checkpoints, self.hardware.keep_every)
        self.preemption = Preemption()
        self.record = Record(self.run, self.step) if self.global_rank == 0 else None
        self.history = alarms.History(metrics_file.tail(self.run) if self.global_rank == 0 else [])
        self.wandb = Wandb(self.run, self.config) if self.global_rank == 0 else None
        self.progress = Progress(self.optim.steps, self.run.name, "steps", self.step) if self.global_rank == 0 else None

    def train_dataloader(self) -> LoaderProcess:
        self.loader = self.batches(self.step, self.optim.steps)
        if self.loader.through_pipe and self.global_rank == 0:
            say(
                f"{self.run}: {SHARED_MEMORY} has no room for the batches on their way, so they go through a pipe, which is slower"
            )
        return self.loader

    def on_train_start(self) -> None:
        if asked := self.preemption.asked():  # a signal while starting: there is nothing new to save
            self._end_early(asked)

    def training_step(self, batch: Any, _: int) -> None:
        if isinstance(batch, Fault):
            raise batch
        if self.lease and self.lease.lost:
            raise Fault(
                f"{self.run} was taken over by another job, since nothing was heard of this one for {SILENCE:.0f} s (a stopped process, or "
                f"a disk that didn't answer): this one ends, and has written nothing since."
            )
        began = time.monotonic()
        seen = self.before_step(batch)
        figures, took_step = self._step(batch)
        figures |= seen
        self.step += 1
        now = time.monotonic()
        figures |= {
            f"{self.unit}_per_second": self.taken / (now - self._ended),
            "data_wait": (began - self._ended) / (now - self._ended),
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        if self.peak:
            figures["flop_utilisation"] = self.tile_operations * self.tiles_taken / (now - self._ended) / self.peak
        self._ended = now
        self.watchdog.beat()
        if self.step % self.hardware.log_every == 0 or self.step == self.optim.steps or not took_step:
            self._log(figures)
        if self.progress:
            self.progress.advance(1, f"loss {figures['loss']:.4f}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        last = self.step == self.optim.steps
        due = last or any(every and self.step % every == 0 for every in self._save_every())
        looks = bool(self.watch.every) and self.step % self.watch.every == 0
        asked = None if last else self.preemption.asked()
        if asked:  # before anything that takes time: there may be half a minute
            self._save(wait=True)
            self._end_early(asked)
        if looks:
            began = time.monotonic()
            figures = self.look(batch)
            self._log(figures | {"look_seconds": time.monotonic() - began})
        if due and not asked:
            try:
                figures = self.evaluate()
            except signals.Asked as during:
                asked = during.signal
                self._save(wait=True)
                self._end_early(asked)
                return
            if figures:
                self._log(figures)
                self._judge(figures)
        if looks or due:
            self._raise_alarms()  # before saving: a checkpoint says which were raised
        if due and not asked:
            self._save(wait=last or self.trainer.should_stop)
            if last and (why := self._unfit()):
                raise Fault(
                    f"{self.run} is not done: of its last step, {self.step}, there is no checkpoint, since {why}; {self._newest_said()}: "
                    "go on with a lower optim.lr and allow_changes=true, or look at the data."
                )
        elif not due:
            self._heed(self.saver.outcome())
        if looks or due:
            self.watchdog.beat()
            self._ended = time.monotonic()  # neither is waiting for data

    def on_fit_end(self) -> None:
        if self.progress:
            self.progress.close()
        if self.wandb and self.record:
            self.wandb.close()
            self.record.close()

    def heeding(self, batches: Iterable[T], total: int) -> Iterator[T]:
        """``batches`` of an evaluation, as many on every rank, with progress shown; a signal ends it with `signals.Asked`."""
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

    def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
        return batch  # a stage moves a micro-batch when its turn comes

    # The step --------------------------------------------------------------------------------------------------

    def _save_every(self) -> tuple[int | None, ...]:
        return self.hardware.checkpoint_every, self.hardware.keep_every

    def _checkpoint(self) -> tuple[int, Objective, torch.optim.Optimizer, dict[str, Any]]:
        """This moment, as a checkpoint takes it."""
        state = {
            "samples": self.position(),
            "skipped": self.skipped,
            "alarms": sorted(self.raised),
            "scores": self.scored,
            "config": self.hash,
            "data": self.data_digest(),
            "settings": redacted_settings(asdict(self.config)),
            **self.software,
        }
        return self.step, self.objective, self._optimiser(), state

    def _save(self, wait: bool) -> None:
        """Have a checkpoint of this moment written, beside training or waited for; the best one there is, is marked before it
        could be swept away. None is written while steps are skipped, or of numbers that aren't finite: it would push out one that can
        be gone on from."""
        self._heed(self.saver.wait())
        self._mark_best()
        if why := self._unfit():
            if self.global_rank == 0:
                say(f"{self.run}: no checkpoint of step {self.step}, since {why}; {self._newest_said()}")
            return
        if wait:
            self.saver.save(*self._checkpoint())
            self._mark_best()
        else:
            self._heed(self.saver.begin(*self._checkpoint()))

    def _unfit(self) -> str | None:
        """Why this moment must not become a checkpoint, on all ranks alike, or None."""
        if self.skipped_in_a_row:
            return "its step was skipped"
        if int(
            total(torch.tensor(int(not checkpoints.is_finite(self.objective, self._optimiser())), device=self.device))
        ):
            return "its weights or the optimiser's moments are not finite"
        return None

    def _newest_said(self) -> str:
        newest = checkpoints.newest(self.run)
        return f"the newest finite one is {newest}" if newest else "there is none before it"

    def _mark_best(self) -> None:
        if self.global_rank == 0:
            best.mark(self.run, self.scored)

    def _heed(self, failure: str | None) -> None:
        """Say and count a save that failed; the run goes on, since the next one may succeed. Every rank sees the same."""
        if failure:
            self.failed_saves += 1
            if self.global_rank == 0:
                say(f"{failure}; training goes on, and saves again after {self.hardware.checkpoint_every} steps")
            self._log({"failed_saves": self.failed_saves})

    def _end_early(self, asked: signal.Signals) -> None:
        """Let Lightning end the run after this batch, because a signal asked; every rank is here. What there is to save is saved."""
        self.ended_early = self.trainer.should_stop = True
        if self.global_rank == 0:
            newest = checkpoints.newest(self.run)
            saved = f"checkpoint {newest}" if newest else "nothing to save yet"
            say(
                f"{self.run}: stopped by {asked.name} after step {self.step} of {self.optim.steps}, {saved}; the same command continues"
            )
        self.asked = asked
        self.requeued = asked != signal.SIGINT and self.preemption.requeue(
            self.global_rank == 0, in_vain=checkpoints.newest(self.run) == self.began_from
        )

    def position(self) -> int:
        """Samples of the stream that were taken until now; a function of the step, as everything about the data is."""
        return self.step * self.batch_size

    def data_digest(self) -> str:
        """A hash of the data that the run reads."""
        return ""

    def _check_data(self, checkpoint: Path) -> None:
        if checkpoints.read_state(checkpoint)["data"] != self.data_digest():
            now = f"the data is not what {self.run} was trained on until now: shards or embeddings were added to or remade"
            if not self.config.allow_changes:
                raise Fault(
                    f"{now}; put them back as they were, or give another run=, or allow_changes=true to go on with these."
                )
            if self.global_rank == 0:
                say(f"{now}; it goes on with these, at its place in their order")

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
                f"optim.max_skipped={self.optim.max_skipped}; {self._newest_said()}: go on with a lower optim.lr and allow_changes=true, "
                "or look at the data."
            )

    def _optimiser(self) -> torch.optim.Optimizer:
        return self.optimizers().optimizer  # type: ignore[union-attr, return-value]

    def _log(self, figures: dict[str, float]) -> None:
        if self.record and self.wandb:
            self.record.add(self.step, figures)
            self.wandb.add(self.step, figures)
            self.history.add(self.step, figures)

    def _raise_alarms(self) -> None:
        """Say and record what the record shows to be wrong, each thing once in the run's life."""
        if self.record and self.wandb:
            for alarm in alarms.find_alarms(self.history, self.facts):
                if alarm.name not in self.raised:
                    self.raised.add(alarm.name)
                    say(f"{self.run}: ALARM at step {self.step}, {alarm.name}: {alarm.says}")
                    self.record.alarm(self.step, alarm)
                    self.wandb.alarm(alarm)

    def _judge(self, figures: dict[str, float]) -> None:
        """Note a checkpoint's score; decide, on all ranks alike, whether to wait for a better one."""
        score = figures.get(self.score)
        if score is not None and math.isfinite(score):
            self.scored.append((self.step, score))
        gone = int(total(torch.tensor(best.waited(self.scored) if self.global_rank == 0 else 0, device=self.device)))
        if self.watch.patience and gone >= self.watch.patience:
            self.trainer.should_stop = True
            if self.global_rank == 0:
                say(why_ended(self.run, self.scored, self.score))


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
        loss, figures = loss_of(objective, part, replace(moment, first=first))
        backward(loss / len(parts))
        for name, value in {"loss": loss, **figures}.items():
            means[name] = means.get(name, 0.0) + wide(value.detach()) / len(parts)
    return means


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: on its GPU, as torch allocated them, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def prepare_utilisation(training: Training, trainer: L.Trainer, count_operations: Callable[[bool], float]) -> None:
    """Find what ``flop_utilisation`` is computed from, where the devices' peak is known, or say why there will be none."""
    hardware, device = training.hardware, trainer.strategy.root_device
    peak = hardware.peak_tflops * 1e12 if hardware.peak_tflops else peak_of(device, hardware.precision)
    if peak is None:
        return
    try:
        training.tile_operations = count_operations(device.type == "cuda")
    except Exception as error:  # a plug-in may do what tensors without numbers can't: no reason not to train
        if trainer.is_global_zero:
            say(f"{training.run}: no flop_utilisation, since a step's operations can't be counted ({error!r})")
        return
    training.peak = peak * trainer.world_size


def why_ended(run: Path, scored: best.Scores, name: str) -> str:
    """The line with which a run ends early."""
    step, score = best.best(scored)
    return (
        f"{run} ends after step {scored[-1][0]}: {name} has not risen above {score:.4f}, of step {step}, in {best.waited(scored)} checkpoints "
        f"(watch.patience), and longer training has made published models worse; {checkpoints.folder(run) / checkpoints.BEST} is the best one. "
        "watch.patience=null goes on."
    )


def fit(training: Training, lease: Lease | None, count_operations: Callable[[bool], float]) -> None:
    """Run ``training`` to its last step, resuming from its newest checkpoint; says so where nothing is left to do.

    ``lease`` is that of the run's folder, in its first process. ``count_operations`` gives the floating-point operations that a tile of a step
    costs, by whether attention is fused; it is called before the processes have joined.
    """
    training.lease = lease
    pass_over_damaged(training.run, training.config.resume, first=lease is not None or not rank())
    newest = checkpoints.newest(training.run)
    if newest is not None and checkpoints.read_state(newest)["step"] >= training.optim.steps:
        run_folder.open_run(training.run, training.config, first_rank=False, data=training.data_digest())
        training._check_data(newest)
        say(f"{training.run} is done: {training.optim.steps} steps, checkpoint {newest}")
        return
    if newest is not None and training.watch.patience:
        scored = [(step, score) for step, score in checkpoints.read_state(newest)["scores"]]
        if best.waited(scored) >= training.watch.patience:
            run_folder.open_run(training.run, training.config, first_rank=False, data=training.data_digest())
            training._check_data(newest)
            say(why_ended(training.run, scored, training.score))
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
    # Lightning's own handler of SIGTERM exchanges with other ranks from inside the handler, which deadlocks.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    prepare_utilisation(training, trainer, count_operations)
    began = time.monotonic()
    open_more_files()
    with signals.listening(), training.watchdog:
        try:
            trainer.fit(training)
        except RuntimeError as error:
            if fault := ended_by(error) or out_of_memory(training.run, error):
                raise fault from error
            raise
        finally:
            if training.loader is not None:
                training.loader.end()
        if training.ended_early:
            preemption.leave(training.requeued, trainer.local_rank, training.asked)
    if trainer.is_global_zero:
        say(
            f"{training.run}: {training.step} steps in {duration(time.monotonic() - began)}, checkpoint {checkpoints.newest(training.run)}"
        )


def out_of_memory(run: Path, error: RuntimeError) -> Fault | None:
    """The sentence for torch's error where it found no memory, a GPU's or the machine's."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    said = str(error).splitlines()[0].rpartition("DefaultCPUAllocator: ")[2]
    return Fault(
        f"{run}: there is not enough memory ({said}); 'pretrain plan' with these settings says what takes how much, and what would fit. The newest "
        f"checkpoint is {checkpoints.newest(run) or 'none yet'}."
    )


def require_devices(hardware: Hardware) -> None:
    """Raise Fault where this machine hasn't the devices that a run asks for."""
    gpus = torch.cuda.device_count()
    if hardware.accelerator == "gpu" and not gpus and not torch.backends.mps.is_available():
        raise Fault(
            "trainer.accelerator=gpu, and PyTorch finds no GPU on this machine: trainer.accelerator=cpu trains on its cores, and "
            "'pretrain doctor' says what there is."
        )
    if hardware.accelerator != "cpu" and 0 < gpus < hardware.devices:
        raise Fault(
            f"trainer.devices={hardware.devices} is more than the {gpus} GPUs that PyTorch finds on this machine: set it to {gpus} or less."
        )


RESUME = one_of("newest", "previous")
"""Which checkpoint a run goes on from."""


def pass_over_damaged(run: Path, resume: str, first: bool) -> None:
    """See that a run's newest checkpoint is whole, by setting damaged ones aside where ``resume`` is previous.

    Raises Fault where it is newest, with what is damaged and which one before it is whole.
    """
    newest = checkpoints.newest(run)
    wrong = checkpoints.damage(newest) if newest else None
    if newest is None or wrong is None:
        return
    if resume == "newest":
        raise Fault(
            f"{wrong}{checkpoints.whole_before(newest)}: resume=previous sets what is damaged aside and goes on from there; or put the file back."
        )
    if first:
        for aside in checkpoints.set_damaged_aside(run):
            say(f"{run}: {wrong}; it is now {aside}")
    while (newest := checkpoints.newest(run)) is not None and checkpoints.damage(newest):
        time.sleep(0.5)  # until the first process has set it aside


def _quieten_lightning() -> None:
    """What Lightning and FSDP say at start-up is about defaults that are not used here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*IterableDataset.*",
        ".*LeafSpec.*",
        ".*returned a view tensor.*",
        ".*`srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", pattern)
