"""What the record shows to be wrong is said and recorded, each thing once in the run's life."""

from typing import Any

import lightning as L

from pretrain.run.alarms import find_alarms
from pretrain.run.progress import say
from pretrain.run.record import RunRecord, WandbMirror
from pretrain.training.judging import Judgement
from pretrain.training.module import Training


class Alarms(L.Callback):
    """Asks `find_alarms` after every look and at every checkpoint, before that is written: it says which were
    raised."""

    def __init__(self, record: RunRecord, mirror: WandbMirror, judgement: Judgement) -> None:
        self.own, self.mirror, self.judgement = record, mirror, judgement

    def on_train_batch_end(self, trainer: L.Trainer, training: Training, *_: Any) -> None:  # type: ignore[override]
        if not trainer.is_global_zero or not (training.looks_now or training.is_due) or self.judgement.cut_short:
            return
        for alarm in find_alarms(self.own.history, training.facts):
            if alarm.name not in training.raised:
                training.raised.add(alarm.name)
                say(f"{training.run}: ALARM at step {training.step}, {alarm.name}: {alarm.says}")
                self.own.alarm(training.step, alarm)
                self.mirror.alarm(alarm)
