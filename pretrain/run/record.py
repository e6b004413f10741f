"""The record of a run, as Lightning's loggers: ``metrics.jsonl`` always, Weights & Biases beside it when asked.

What the run itself finds out is given to `RunLogger.record`. Whatever else comes, by Lightning's ``log`` or straight from a
user's callback, is recorded as ``callbacks/NAME``: a callback's ``loss`` is never taken for the run's.
"""

import errno
import json
import math
import os
import secrets
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from data.fault import Fault
from data.files import refused, write_whole
from data.redaction import redacted_settings
from pretrain.run import metrics as metrics_file
from pretrain.run.history import Alarm, History
from pretrain.run.progress import say
from pretrain.run.wandb_settings import WandbSettings, logged_in


class RunLogger(Logger):
    """What Lightning asks of any logger, of one that belongs to a run's folder. Only the first rank logs.

    ``present``: the step that is being taken, or was just taken.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.folder, self.present = run, 0

    @abstractmethod
    def record(self, figures: Mapping[str, float], step: int) -> None:
        """Take figures of ``step``, under the names that they have."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Take what callbacks log, each as ``callbacks/NAME``; without a ``step``, of the present one. Raises Fault for
        what is no number."""
        # Lightning adds the epoch, of which a run has one.
        figures = {f"callbacks/{name}": number(name, value) for name, value in metrics.items() if name != "epoch"}
        if figures:
            self.record(figures, self.present if step is None else step)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> None:
        return None

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in the run's ``config.yaml``."""


def number(name: str, value: Any) -> float:
    """A figure of a callback's as Python's number: what is one already, or a tensor or an array of one. Raises Fault
    for anything else."""
    try:
        plain = value.item() if hasattr(value, "item") else value
        math.isfinite(plain)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Fault(
            f"trainer.callbacks: the figure {name} is {value!r}, and the record takes single numbers: log one, as"
            " value.mean()."
        ) from error
    return plain  # type: ignore[no-any-return]


class RunRecord(RunLogger):
    """``metrics.jsonl``: one JSON object a line, on disk at once; a resumed run first drops the steps it will retake.

    Lines that the disk refuses are kept, said once, and written before the next one that it takes. ``history``: what
    alarms look back on.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.path = metrics_file.path_of(run)
        self.file: FileIO | None = None
        self.waiting: list[bytes] = []

    @rank_zero_only
    def begin(self, step: int) -> None:
        """Open the file for what comes after ``step``. Raises Fault where the disk refuses."""
        try:
            metrics_file.rewind(
                self.folder, step or -1
            )  # what a start looked at before its first step is looked at again
            self.file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise refused(self.path, error) from error
        self.history = History([*metrics_file.of_the_start(self.folder), *metrics_file.tail(self.folder)])

    @rank_zero_only
    def record(self, figures: Mapping[str, float], step: int) -> None:
        """Write a line. Raises Fault while the file isn't open, where only a callback can have called."""
        if self.file is None:
            raise Fault(
                f"trainer.callbacks: {', '.join(figures)} came while no step was being taken: log from on_train_start to"
                " on_train_end."
            )
        # JSON knows no NaN: the figures of a skipped step that aren't finite are null.
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._write({"step": step, **finite})
        self.history.add(step, figures)

    @rank_zero_only
    def alarm(self, step: int, alarm: Alarm) -> None:
        """Record an alarm that was raised at ``step``."""
        self._write({"step": step, "alarm": alarm.name, "since": alarm.since, "says": alarm.says})

    @rank_zero_only
    def close(self) -> None:
        """Try once more what waits for room, and say what was never written."""
        if self.file is None:  # the run ended before its first step
            return
        if self.waiting and self._written():
            say(f"{self.path} lacks its last {len(self.waiting)} lines, for which there was no room")
        self.file.close()
        self.file = None

    def _write(self, line: dict[str, Any]) -> None:
        first = not self.waiting
        self.waiting.append((json.dumps(line) + "\n").encode())
        refusal = self._written()
        if refusal is not None and first:
            say(
                f"{self.path} can't be written ({refusal}); training goes on, and what waits is written when there is"
                " room"
            )
        elif refusal is None and not first:
            say(f"{self.path} is written again, with all that waited")

    def _written(self) -> OSError | None:
        """Write what waits; what the disk said where it refused, with nothing half written."""
        assert self.file is not None
        try:
            end = os.fstat(self.file.fileno()).st_size
            text = b"".join(self.waiting)
            if self.file.write(text) != len(text):
                self.file.truncate(end)
                return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            return error
        self.waiting = []
        return None


@contextmanager
def _redacted_arguments() -> Iterator[None]:
    """While W&B starts, which keeps the command line too."""
    before = sys.argv
    sys.argv = redacted_settings(before)
    try:
        yield
    finally:
        sys.argv = before


class WandbMirror(RunLogger):
    """A mirror of the record in Weights & Biases; the run's id is kept in its folder, so that a resumed run goes on
    there.

    ``online`` needs a login and, without one, writes offline and says so. An offline run can't be resumed in place:
    each start writes a segment of its own, steps disjoint, for ``wandb sync`` to join.
    """

    def __init__(self, run: Path, config: Any) -> None:
        super().__init__(run)
        self.config = config
        self.run: Any = None

    @rank_zero_only
    def begin(self) -> None:
        """Start a segment, unless ``wandb.mode`` is off."""
        settings: WandbSettings = self.config.wandb
        if settings.mode == "off":
            return
        import wandb

        mode = settings.mode
        if mode == "online" and not logged_in():
            say("wandb: not logged in ('wandb login'), so this run is written offline; 'wandb sync' uploads it later")
            mode = "offline"
        path = self.folder / "wandb_id.txt"
        if not path.exists():
            write_whole(path, secrets.token_hex(4))
        with _redacted_arguments():
            self.run = wandb.init(
                project=settings.project,
                name=self.name,
                id=path.read_text().strip(),
                resume="allow" if mode == "online" else None,
                mode=mode,  # type: ignore[arg-type]
                dir=self.save_dir,
                config=redacted_settings(asdict(self.config)),
            )

    @rank_zero_only
    def record(self, figures: Mapping[str, float], step: int) -> None:
        """Send a line."""
        self._ask(lambda run: run.log(dict(figures), step=step))

    def alarm(self, alarm: Alarm) -> None:
        """Send an alarm, which W&B mails to those who asked for it."""
        self._ask(lambda run: run.alert(alarm.name, alarm.says))

    def close(self) -> None:
        """Finish the segment."""
        self._ask(lambda run: run.finish())

    def _ask(self, act: Callable[[Any], None]) -> None:
        """A mirror that breaks is no reason to stop: W&B's own process ends by the SIGTERM with which a cluster asks
        for a checkpoint."""
        if self.run is None:
            return
        try:
            act(self.run)
        except Exception as error:  # its process is gone, its disk full, its server at odds with it
            self.run = None
            say(f"wandb: {type(error).__name__}: {error}; what follows is in metrics.jsonl only")
