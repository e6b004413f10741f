"""An objective for jobs that are to be stopped: the same steps, slow until they are."""

import time

from pretrain.objectives.dinov2 import DINOv2
from pretrain.objectives.interface import Moment

SECONDS = 10.0


class SlowDINOv2(DINOv2):
    """DINOv2 that waits after every step, except in a process that goes on where another was stopped."""

    resumed: bool | None = None

    def after_step(self, moment: Moment) -> None:
        if self.resumed is None:
            self.resumed = moment.step > 0
        if not self.resumed:
            time.sleep(SECONDS)
        super().after_step(moment)
