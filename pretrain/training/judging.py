"""Held-out data judge a run at every checkpoint: the best one is kept, and a run that waits for better ones in vain
ends, ``watch.patience``."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from pretrain.run import best, checkpoints, signals
from pretrain.run.across_ranks import total
from pretrain.run.progress import say
from pretrain.training.ending import EndWhenAsked
from pretrain.training.module import Training


class Judgement(L.Callback):
    """Records what the stage's `evaluate` says, of the first weights what `evaluate_first` does, and notes the score. A
    signal ends an evaluation, and the run."""

    def __init__(self, ending: EndWhenAsked) -> None:
        self.ending = ending
        self.cut_short = False  # whether a signal ended an evaluation: the checkpoint of that step is written

    def on_train_start(self, trainer: L.Trainer, training: Training) -> None:  # type: ignore[override]
        if training.step > 0 or training.asked is not None:
            return
        try:
            figures = training.evaluate_first()
        except signals.Asked as during:
            self.ending.end(training, during.signal)
            return
        if figures:
            training.record(figures)

    def on_train_batch_end(self, trainer: L.Trainer, training: Training, *_: Any) -> None:  # type: ignore[override]
        if not training.is_due or training.asked is not None:
            return
        began = time.monotonic()
        try:
            figures = training.evaluate()
        except signals.Asked as during:
            self.ending.save_and_end(training, during.signal)
            self.cut_short = True
            return
        if figures:
            if training.global_rank == 0:
                say(f"{training.run}: judged after step {training.step}: {in_words(figures, training.score)}")
            training.record(figures | {"evaluation_seconds": time.monotonic() - began})
            self.judge(training, figures)

    def judge(self, training: Training, figures: dict[str, float]) -> None:
        """Note a checkpoint's score; decide, on all ranks alike, whether to wait for a better one."""
        score = figures.get(training.score)
        if score is not None and not math.isfinite(score) and training.global_rank == 0:
            say(
                f"{training.run}: {training.score} isn't finite after step {training.step}, so it is compared with no other"
            )
        if score is not None and math.isfinite(score):
            training.scored.append((training.step, score))
        waited = best.waited(training.scored) if training.global_rank == 0 else 0
        gone = int(total(torch.tensor(waited, device=training.device)))
        if training.watch.patience and gone >= training.watch.patience:
            training.trainer.should_stop = True
            if training.global_rank == 0:
                say(why_ended(training.run, training.scored, training.score))


def in_words(figures: Mapping[str, float], score: str) -> str:
    """``r2 0.31, r2_neighbours 0.28, …``: the score first, beside what it is to be compared with."""
    ordered = sorted(figures, key=lambda name: (not name.startswith(score or " "), name != score))
    return ", ".join(f"{name} {figures[name]:.3g}" for name in ordered)


def why_ended(run: Path, scored: best.Scores, name: str) -> str:
    """The line with which a run ends early."""
    step, score = best.best(scored)
    return (
        f"{run} ends after step {scored[-1][0]}: {name} has not risen above {score:.4f}, of step {step}, in"
        f" {best.waited(scored)} checkpoints (watch.patience), and longer training has made published models worse;"
        f" {checkpoints.folder(run) / checkpoints.BEST} is the best one. watch.patience=null goes on."
    )
