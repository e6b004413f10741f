"""Features and targets are looked at now and then, ``watch.every``."""

import time
from typing import Any

import lightning as L

from pretrain.training.module import Training


class Looks(L.Callback):
    """Records what the stage's `look` says of the batch that was just used."""

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, training: Training, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if training.looks_now:
            began = time.monotonic()
            if figures := training.look(batch):  # a stage may have nothing to look at
                training.record(figures | {"look_seconds": time.monotonic() - began})
