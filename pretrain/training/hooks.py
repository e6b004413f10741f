"""What a user may hang into Lightning's trainer, and what there is in place of callbacks that ask for a step or a saving of
their own kind."""

import inspect

import lightning as L
import lightning.pytorch.callbacks as pl
from lightning.pytorch.callbacks.pruning import ModelPruning
from lightning.pytorch.loggers import Logger

from data.fault import Fault
from pretrain.settings import plugins
from pretrain.settings.plugins import Plugin

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


def require_hooks(callbacks: list[Plugin], loggers: list[Plugin]) -> None:
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
