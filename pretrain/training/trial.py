"""``trainer.fast_dev_run=true``: one step of a run with all that comes around it, in a folder that is thrown away."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.fault import Fault
from pretrain.run import checkpoints
from pretrain.run.launched import rank
from pretrain.run.progress import say


@contextmanager
def run_or_trial(config: Any) -> Iterator[Path]:
    """The folder of the run that ``config`` describes; of a trial, beside it and gone afterwards, and ``config`` is
    changed to one step with a look, a checkpoint and an evaluation, which nobody else hears of. Raises Fault where one
    that was killed is still there."""
    run = Path(config.run)
    if not config.trainer.fast_dev_run:
        yield run
        return
    trial = run.with_name(f"{run.name}.trial")
    if checkpoints.newest(trial) is not None:
        raise Fault(f"{trial} was left by a trial that was killed: remove it.")
    config.optim.schedule_steps = config.optim.schedule_steps or config.optim.steps
    config.optim.steps = config.watch.every = 1
    config.wandb.mode, config.trainer.loggers = "off", []
    try:
        yield trial
    finally:
        if not rank():
            shutil.rmtree(trial, ignore_errors=True)
    if not rank():
        say(f"{run}: a step, a look, a checkpoint and an evaluation went well; {trial} is removed again")
