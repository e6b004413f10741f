"""``trainer.fast_dev_run=true``: a step of a run with all that comes around it, in a folder that is thrown away; a number
in place of ``true`` is that many steps, as Lightning has it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.fault import Fault
from data.files import make_folder, refused
from pretrain.run import checkpoints
from pretrain.run.launched import rank
from pretrain.run.metrics import read_metrics
from pretrain.run.progress import say


@contextmanager
def run_or_trial(config: Any) -> Iterator[Path]:
    """The folder of the run that ``config`` describes; of a trial, beside it and gone afterwards, and ``config`` is
    changed to its few steps, each with a look, and a checkpoint, which nobody else hears of. What was done of it is said
    at the end. Raises Fault where there is such a folder already: only what was made here is removed."""
    run = Path(config.run)
    if not config.trainer.fast_dev_run:
        yield run
        return
    if run.name in ("", ".."):
        raise Fault(
            f"run={config.run} has no name for a trial to be beside: give the folder by its name, runs/first say."
        )
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
    config.optim.steps = int(config.trainer.fast_dev_run)
    config.watch.every = config.trainer.log_every = 1
    config.wandb.mode, config.trainer.loggers = "off", []
    try:
        yield trial
        done = "" if rank() else what_was_done(trial)
    finally:
        if not rank():
            shutil.rmtree(trial, ignore_errors=True)
    if not rank():
        say(f"{run}: {done}; {trial} is removed again")


def what_was_done(trial: Path) -> str:
    """In words, what of a run went well by its record and its checkpoints."""
    lines = [{name for name in line if not name.startswith("callbacks/")} - {"step"} for line in read_metrics(trial)]
    steps, looks = (sum(name in line for line in lines) for name in ("loss", "look_seconds"))
    # What is in no line of these kinds, held-out data gave.
    evaluations = sum(bool(line) and not line & {"loss", "look_seconds", "alarm", "failed_saves"} for line in lines)
    counts = (
        (steps, "step"),
        (looks, "look"),
        (len(checkpoints.complete(trial)), "checkpoint"),
        (evaluations, "evaluation"),
    )
    said = [f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count]
    if not said:
        return "no step was taken, since a callback ended the trial before the first"
    return f"{' and '.join([', '.join(said[:-1]), said[-1]]) if said[1:] else said[0]} went well"
