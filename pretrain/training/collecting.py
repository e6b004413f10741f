"""Garbage is collected on purpose: by every rank after the same steps.

Python collects by itself when enough was allocated, at another moment on every rank, and all wait for the one that
does: a third of a second each time, with a run's half a million objects.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L
from torch.distributed.fsdp import FSDPModule

from pretrain.objectives.interface import Objective
from pretrain.training.module import Training

EVERY = 100  # steps


@contextmanager
def collecting_by_itself() -> Iterator[None]:
    """While a run lasts; afterwards Python collects as it did before, and what was set aside as lasting may go."""
    before = gc.isenabled()
    try:
        yield
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()


class CollectGarbage(L.Callback):
    """Collects after every so many steps, and lets Python do it by itself in looks and evaluations."""

    def on_train_batch_start(self, *_: Any) -> None:
        if gc.isenabled():
            # What lasts as long as the run is never looked through again. The loader has just collected what doesn't.
            gc.freeze()
            gc.disable()

    def on_train_batch_end(self, trainer: L.Trainer, training: Training, *_: Any) -> None:  # type: ignore[override]
        if training.step % EVERY == 0:
            forget_forwards(training.objective)
            gc.collect()
        if training.looks_now or training.is_due:
            gc.enable()


def forget_forwards(objective: Objective) -> None:
    """Let go of what FSDP2 notes of every forward for the backward that follows. A teacher's never comes, and its notes
    would grow for as long as the run lasts, by about a gigabyte in half a million steps of a ViT-g."""
    for network in objective.frozen().values():
        if isinstance(network, FSDPModule):
            with suppress(AttributeError):  # torch's own, where the network never ran: it has nothing to let go of
                network.reset_iter_state()
