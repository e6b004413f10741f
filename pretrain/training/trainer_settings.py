"""The settings under ``trainer:``: machines, precision, memory for time, how often what is done, and what a user hangs
into Lightning's trainer."""

import inspect
import os
from dataclasses import dataclass
from typing import Annotated, ClassVar

import lightning as L
import lightning.pytorch.callbacks as pl
import torch
from lightning.pytorch.callbacks.pruning import ModelPruning
from lightning.pytorch.loggers import Logger

from data.fault import Fault
from models.allowed import Agreements, one_of, within
from pretrain.run.launched import way_out_of_own_gpus
from pretrain.settings import plugins
from pretrain.settings.plugins import Plugin
from pretrain.training.sharding import CHECKPOINTING, PRECISIONS

PROFILERS = ("simple", "pytorch")


IN_PLACE_OF: dict[type[L.Callback], str] = {
    pl.Checkpoint: "trainer.checkpoint_every=, keep_checkpoints= and keep_every= say what is saved, and watch.probe= keeps the best",
    pl.EarlyStopping: "watch.probe= and watch.patience= end a run that no longer gains",
    pl.ProgressBar: "progress is shown already",
    pl.GradientAccumulationScheduler: "trainer.accumulate= is the number of micro-batches",
    pl.StochasticWeightAveraging: "the teacher is the average of the student's weights",
    pl.WeightAveraging: "the teacher is the average of the student's weights",
    pl.LearningRateFinder: "optim.lr= is given, and a run of a few hundred steps of each (optim.steps= with optim.schedule_steps=) compares some",
    pl.BatchSizeFinder: "'pretrain plan' says what fits, and trainer.accumulate= fits the rest",
    pl.BaseFinetuning: "optim.frozen_backbone_steps= holds the encoder still at first, and optim.layer_decay= its lower blocks back",
    ModelPruning: "a smaller network is trained as one, with model.width= and model.depth=",
}
"""Callbacks of Lightning's that ask for a step or a saving of its own kind, and what there is here."""


def check_hooks(callbacks: list[Plugin], loggers: list[Plugin]) -> None:
    """Raise Fault for a callback or logger that isn't one of Lightning's, doesn't take its arguments, or has no place
    here."""
    for settings, base in [*((one, L.Callback) for one in callbacks), *((one, Logger) for one in loggers)]:
        if "_target_" not in settings:
            raise Fault(f"trainer: {dict(settings)} names no class: give its dotted path, _target_=….")
        kind = plugins.locate_class(settings["_target_"], base)
        if instead := next((words for other, words in IN_PLACE_OF.items() if issubclass(kind, other)), None):
            raise Fault(f"trainer.callbacks: {kind.__name__} has no place here: {instead}.")
        try:
            inspect.signature(kind).bind(**{str(name): settings[name] for name in settings if name != "_target_"})
        except TypeError as error:
            raise Fault(f"trainer: {kind.__name__} can't be made of {dict(settings)}: {error}.") from error


def check_trial(fast_dev_run: int, profiler: str | None) -> None:
    """Raise ValueError for a profile that would be thrown away with the trial that it is of."""
    if fast_dev_run and profiler:
        raise ValueError(
            "a trial's folder is thrown away, and the profile in it; a run of a few steps, optim.steps=, keeps one"
        )


@dataclass
class TrainerSettings:
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
    callbacks: list[Plugin]
    loggers: list[Plugin]
    profiler: Annotated[str | None, one_of(*PROFILERS)]
    fast_dev_run: Annotated[int | bool, within(least=0)]

    agreements: ClassVar[Agreements] = {
        ("callbacks", "loggers"): check_hooks,
        ("fast_dev_run", "profiler"): check_trial,
    }


def require_devices(settings: TrainerSettings) -> None:
    """Raise Fault where this machine hasn't the devices that a run asks for."""
    gpus = torch.cuda.device_count()
    if settings.accelerator == "gpu" and not gpus and not torch.backends.mps.is_available():
        raise Fault(
            "trainer.accelerator=gpu, and PyTorch finds no GPU on this machine: trainer.accelerator=cpu trains on its"
            " cores, and 'pretrain doctor' says what there is."
        )
    if settings.accelerator != "cpu" and 0 < gpus < settings.devices:
        way_out = way_out_of_own_gpus(os.environ) or f"set it to {gpus} or less"
        raise Fault(
            f"trainer.devices={settings.devices} is more than the {gpus} GPUs that PyTorch finds on this machine:"
            f" {way_out}."
        )


RESUME = one_of("newest", "previous")
"""Which checkpoint a run goes on from."""
