"""Checkpoints as a run goes: written beside training when they are due, waited for where the run ends, the best one
marked."""

from typing import Any

import lightning as L
import torch

from data.fault import Fault
from pretrain.run import best, checkpoints
from pretrain.run.across_ranks import total
from pretrain.run.progress import say
from pretrain.run.saving import Saver
from pretrain.training.module import Training


class Checkpoints(L.Callback):
    """Saves; see `Saver`. None is written while steps are skipped, or of numbers that aren't finite: it would push out
    one that can be gone on from. A save that fails is said and counted, and the run goes on, since the next one may
    succeed."""

    def __init__(self) -> None:
        self.failed = 0

    def on_train_start(self, trainer: L.Trainer, training: Training) -> None:  # type: ignore[override]
        self.saver = Saver(training.run, training.settings.keep_checkpoints, training.settings.keep_every)

    def on_train_batch_end(self, trainer: L.Trainer, training: Training, *_: Any) -> None:  # type: ignore[override]
        ends = trainer.should_stop and training.asked is None  # a callback wants it: nothing is lost
        if not training.is_due and not ends:
            self.heed(training, self.saver.outcome())
        elif training.asked is None:
            self.save(training, wait=training.is_last or trainer.should_stop)
            if training.is_last and (why := unfit(training)):
                raise Fault(
                    f"{training.run} is not done: of its last step, {training.step}, there is no checkpoint, since"
                    f" {why}; {checkpoints.words_for_newest(training.run)}: go on with a lower optim.lr and"
                    " allow_changes=true, or look at the data."
                )

    def save(self, training: Training, wait: bool) -> None:
        """Have a checkpoint of this moment written, beside training or waited for; the best one there is, is marked
        before it could be swept away. Every rank calls it."""
        self.heed(training, self.saver.wait())
        mark_best(training)
        if why := unfit(training):
            if training.global_rank == 0:
                said = checkpoints.words_for_newest(training.run)
                say(f"{training.run}: no checkpoint of step {training.step}, since {why}; {said}")
            return
        moment = training.step, training.objective, training.optimiser, training.state()
        if wait:
            self.saver.save(*moment)
            mark_best(training)
        else:
            self.heed(training, self.saver.begin(*moment))

    def heed(self, training: Training, failure: str | None) -> None:
        """Say and count a save that failed. Every rank sees the same."""
        if failure:
            self.failed += 1
            if training.global_rank == 0:
                every = training.settings.checkpoint_every
                say(f"{failure}; training goes on, and saves again after {every} steps")
            training.record({"failed_saves": self.failed})


def mark_best(training: Training) -> None:
    """See that ``checkpoints/best`` is the best-scored one that is there."""
    if training.global_rank == 0:
        best.mark(training.run, training.scored)


def unfit(training: Training) -> str | None:
    """Why this moment must not become a checkpoint, on all ranks alike, or None."""
    if training.skipped_in_a_row:
        return "its step was skipped"
    broken = int(not checkpoints.is_finite(training.objective, training.optimiser))
    if int(total(torch.tensor(broken, device=training.device))):
        return "its weights or the optimiser's moments are not finite"
    return None
