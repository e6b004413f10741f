"""Compute a step of a run again, and find what made its loss or gradient not finite: 'pretrain tile run=… replay=STEP'.

A run of 'pretrain tile' that skips a step for that keeps the networks of that moment in replay/ in its folder, and says
this command. It draws the step's tiles, crops and masks again, computes the step in float32, and in the run's own
precision where float32 has no fault, and says which terms of the loss aren't finite, in which layer that began, and
which tiles do it: other tiles are put in place of half of them, and of half of the rest, until those are left that do it
by themselves. One process does the work of all, a micro-batch of the run's at a time.

replay/step-….json in the run's folder then has all of it, and replay/step-….png the crops of these tiles.

    pretrain tile run=runs/first replay=120
    pretrain tile replay run=runs/first replay=120 accelerator=cpu     # the same
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from models.allowed import ON_DISK, one_of, within


@dataclass
class Config:
    """Types of the settings; values and explanations are in ``configs/tile_replay.yaml``."""

    run: Annotated[str, ON_DISK]
    replay: Annotated[int, within(least=1)]
    accelerator: Annotated[str, one_of("auto", "cpu", "gpu")]
    most: Annotated[int, within(least=1)]


def run(config: Config) -> None:
    """Replay the step, and say what was found."""
    from pretrain.training.replay import replay_step

    replay_step(Path(config.run), config.replay, config.accelerator, config.most)
