"""How far a run is: a bar on a terminal, lines in a log."""

from typing import Any

import lightning as L

from pretrain.run.progress import Progress
from pretrain.training.module import Training


class ShownProgress(L.Callback):
    """Progress over the run's steps, with the loss, on the first rank."""

    shown: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, training: Training) -> None:  # type: ignore[override]
        if trainer.is_global_zero:
            self.shown = Progress(training.optim.steps, training.run.name, "steps", training.step)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, training: Training, outputs: dict[str, Any], *_: Any
    ) -> None:
        if self.shown:
            self.shown.advance(1, f"loss {float(outputs['loss']):.4f}")

    def on_fit_end(self, trainer: L.Trainer, training: Training) -> None:  # type: ignore[override]
        if self.shown:
            self.shown.close()
