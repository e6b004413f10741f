"""A run from its newest checkpoint to its last step, by Lightning's trainer."""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler, PyTorchProfiler, SimpleProfiler

from data.fault import Fault
from data.lease import Lease
from data.loader_process import ended_by, open_more_files
from pretrain.run import best, checkpoints, preemption, signals
from pretrain.run import folder as run_folder
from pretrain.run.launched import rank
from pretrain.run.progress import duration, say
from pretrain.run.record import RunRecord, WandbMirror
from pretrain.settings import plugins
from pretrain.settings.hardware import allow_tf32
from pretrain.training.alarming import Alarms
from pretrain.training.checkpointing import Checkpoints
from pretrain.training.collecting import CollectGarbage, collecting_by_itself
from pretrain.training.ending import EndWhenAsked
from pretrain.training.judging import Judgement, why_ended
from pretrain.training.looking import Looks
from pretrain.training.module import Training
from pretrain.training.recording import Recording
from pretrain.training.sharded_strategy import ShardedStrategy
from pretrain.training.showing import ShownProgress
from pretrain.training.utilisation import device_peak


def fit(training: Training, lease: Lease | None) -> None:
    """Run ``training`` to its last step, resuming from its newest checkpoint; says so where nothing is left to do.

    ``lease`` is that of the run's folder, in its first process.
    """
    training.lease = lease
    pass_over_damaged(training.run, training.config.resume, first=lease is not None or not rank())
    newest = checkpoints.newest(training.run)
    if newest is not None and (said := why_done(training, newest)):
        run_folder.open_run(training.run, training.config, first_rank=False, data=training.data_digest())
        training.require_same_data(newest)
        say(said)
        return
    settings, run = training.settings, training.run
    record, mirror, saving = RunRecord(run), WandbMirror(run, training.config), Checkpoints()
    ending = EndWhenAsked(saving)
    judgement = Judgement(ending)
    trainer = bare_trainer(
        training,
        # After each step in this order: what a checkpoint holds must have happened before it.
        callbacks=[
            CollectGarbage(),
            Recording(record, mirror),
            ending,
            Looks(),
            judgement,
            *(plugins.build(one, base=L.Callback) for one in settings.callbacks),
            Alarms(record, mirror, judgement),
            saving,
            ShownProgress(),
        ],
        logger=[record, mirror, *(plugins.build(one, base=Logger) for one in settings.loggers)],
        profiler=profiler(settings.profiler, run),
        log_every_n_steps=1,
    )
    # Lightning's own handler of SIGTERM exchanges with other ranks from inside the handler, which deadlocks.
    if hasattr(trainer, "_signal_connector"):
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    else:
        say(
            f"{run}: Lightning {L.__version__} keeps its signal handlers where they can't be set aside, and a signal to"
            " several processes may hang them: lightning==2.6.4 is a version whose handlers can."
        )
    training.peak = device_peak(settings, trainer.strategy.root_device)
    began = time.monotonic()
    open_more_files()
    with signals.listening(), training.watchdog, collecting_by_itself():
        try:
            trainer.fit(training)
        except RuntimeError as error:
            if fault := ended_by(error) or out_of_memory(run, error):
                raise fault from error
            raise
        except ModuleNotFoundError as error:  # Lightning's callbacks look for theirs in setup, before anything is done
            raise plugins.package_missing("what trainer.callbacks or trainer.loggers name", error) from error
        finally:
            if training.loader is not None:
                training.loader.end()
        if training.asked is not None:
            preemption.leave(ending.requeued, trainer.local_rank, training.asked)
    if trainer.is_global_zero:
        newest = checkpoints.newest(run)
        early = training.step < training.optim.steps and not (newest and why_done(training, newest))
        ended = f", ended by a callback before step {training.optim.steps}: the same command continues" if early else ""
        say(
            f"{run}: {training.step} steps in {duration(time.monotonic() - began)}, checkpoint {newest or 'none'}{ended}"
        )


def why_done(training: Training, newest: Path) -> str | None:
    """The line for a run whose ``newest`` checkpoint leaves nothing to do, None where there is something."""
    state = checkpoints.read_state(newest)
    if state["step"] >= training.optim.steps:
        return f"{training.run} is done: {training.optim.steps} steps, checkpoint {newest}"
    scored = [(step, score) for step, score in state["scores"]]
    if training.watch.patience and best.waited(scored) >= training.watch.patience:
        return why_ended(training.run, scored, training.score)
    return None


def profiler(name: str | None, run: Path) -> Profiler | None:
    """``trainer.profiler``: Lightning's own, which writes into ``profile/`` in the run's folder."""
    folder = run / "profile"
    if name == "simple":
        return SimpleProfiler(folder, "profile")
    if name == "pytorch":
        # The first step compiles, and a trace of many steps is too large to open.
        three = torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
        return PyTorchProfiler(folder, "trace", schedule=three, export_to_chrome=True)
    return None


def out_of_memory(run: Path, error: RuntimeError) -> Fault | None:
    """The sentence for torch's error where it found no memory, a GPU's or the machine's."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    said = str(error).splitlines()[0].rpartition("DefaultCPUAllocator: ")[2]
    return Fault(
        f"{run}: there is not enough memory ({said}); 'pretrain plan' with these settings says what takes how much, and"
        f" what would fit. The newest checkpoint is {checkpoints.newest(run) or 'none yet'}."
    )


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
            f"{wrong}{checkpoints.whole_before(newest)}: resume=previous sets what is damaged aside and goes on from"
            " there; or put the file back."
        )
    if first:
        for aside in checkpoints.set_damaged_aside(run):
            say(f"{run}: {wrong}; it is now {aside}")
    while (newest := checkpoints.newest(run)) is not None and checkpoints.damage(newest):
        time.sleep(0.5)  # until the first process has set it aside


def bare_trainer(training: Training, **added: Any) -> L.Trainer:
    """Lightning's trainer on the run's processes, without what it would do itself and is ours: checkpoints, progress,
    an order of tiles."""
    allow_tf32()
    quieten_lightning()
    return L.Trainer(
        accelerator=training.settings.accelerator,
        devices=training.settings.devices,
        num_nodes=training.settings.nodes,
        strategy=ShardedStrategy(training.settings.shard_size),
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=training.run,
        **added,
    )


def quieten_lightning() -> None:
    """What Lightning and FSDP say at start-up is about defaults that are not used here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*IterableDataset.*",
        ".*LeafSpec.*",
        ".*returned a view tensor.*",
        ".*in eval mode at the start.*",  # a given teacher is
        ".*`srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", pattern)
