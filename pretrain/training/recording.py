"""A run's record and its mirror are opened where its first step is known, told which one is being taken, and closed where
it ends."""

from typing import Any

import lightning as L

from pretrain.run.record import RunRecord, WandbMirror
from pretrain.training.module import Training


class Recording(L.Callback):
    """Opens and closes what `Training.record` writes to."""

    def __init__(self, record: RunRecord, mirror: WandbMirror) -> None:
        self.own, self.mirror = record, mirror

    def on_train_start(self, trainer: L.Trainer, training: Training) -> None:  # type: ignore[override]
        self.on_train_batch_start(trainer, training)
        self.own.begin(training.step)
        self.mirror.begin()

    def on_train_batch_start(self, trainer: L.Trainer, training: Training, *_: Any) -> None:  # type: ignore[override]
        self.own.present = self.mirror.present = training.step + 1

    def on_fit_end(self, trainer: L.Trainer, training: Training) -> None:  # type: ignore[override]
        self.mirror.close()
        self.own.close()
