"""A run that is asked to end saves and ends: after a batch, before anything that takes time, since there may be half a
minute."""

import signal
from typing import Any

import lightning as L

from pretrain.run import checkpoints
from pretrain.run.progress import say
from pretrain.training.checkpointing import Checkpoints
from pretrain.training.module import Training


class EndWhenAsked(L.Callback):
    """Heeds the signals that `pretrain.run.signals` notes; ``requeued``: SLURM starts the job again."""

    def __init__(self, saving: Checkpoints) -> None:
        self.saving, self.requeued = saving, False

    def on_train_start(self, trainer: L.Trainer, training: Training) -> None:  # type: ignore[override]
        if asked := training.preemption.asked():  # a signal while starting: there is nothing new to save
            self.end(training, asked)

    def on_train_batch_end(self, trainer: L.Trainer, training: Training, *_: Any) -> None:  # type: ignore[override]
        if not training.is_last and (asked := training.preemption.asked()):
            self.save_and_end(training, asked)

    def save_and_end(self, training: Training, asked: signal.Signals) -> None:
        """Let Lightning end the run after this batch, with a checkpoint of it; every rank is here."""
        self.saving.save(training, wait=True)
        self.end(training, asked)

    def end(self, training: Training, asked: signal.Signals) -> None:
        """Let Lightning end the run after this batch, and have SLURM start it again where it does; what there is to
        save is saved."""
        training.asked = asked
        training.trainer.should_stop = True
        newest = checkpoints.newest(training.run)
        if training.global_rank == 0:
            saved = f"checkpoint {newest}" if newest else "nothing to save yet"
            say(
                f"{training.run}: stopped by {asked.name} after step {training.step} of {training.optim.steps},"
                f" {saved}; the same command continues"
            )
        in_vain = newest == training.began_from
        self.requeued = asked != signal.SIGINT and training.preemption.requeue(
            training.global_rank == 0, in_vain=in_vain
        )
