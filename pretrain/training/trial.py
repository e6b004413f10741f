"""``trainer.fast_dev_run=true``: one step of a run with all that comes around it, in a folder that is thrown away."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.fault import Fault
from data.files import make_folder, refused
from pretrain.run.launched import rank
from pretrain.run.progress import say


@contextmanager
def run_or_trial(config: Any) -> Iterator[Path]:
    """The folder of the run that ``config`` describes; of a trial, beside it and gone afterwards, and ``config`` is
    changed to one step with a look, a checkpoint and an evaluation, which nobody else hears of. Raises Fault where there
    is such a folder already: only what was made here is removed."""
    run = Path(config.run)
    if not config.trainer.fast_dev_run:
        yield run
        return
    trial = run.with_name(f"{run.name}.trial")
    if not rank():
        make_folder(trial.parent)
        try:
            trial.mkdir()
        except FileExistsError as error:
            raise Fault(
                f"{trial} is there already: another trial runs in it, or was killed. Wait for it, or remove it."
            ) from error
        except OSError as error:
            raise refused(trial, error) from error
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
