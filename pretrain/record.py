"""The record of a run: ``metrics.jsonl`` always, Weights & Biases beside it when asked."""

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.fault import Fault
from pretrain import run_folder
from pretrain.progress import say


@dataclass
class WandbSettings:
    """The settings under ``wandb:``: ``mode`` is off, online or offline."""

    mode: str
    project: str


class Record:
    """``metrics.jsonl``: one JSON object a line, flushed line by line; a resumed run first drops the steps it will retake."""

    def __init__(self, run: Path, step: int) -> None:
        run_folder.rewind_metrics(run, step)
        self.file = (run / "metrics.jsonl").open("a")

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures of ``step``."""
        try:
            # JSON knows no NaN: the figures of a skipped step that aren't finite are null.
            finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            self.file.flush()
        except OSError as error:
            raise Fault(
                f"{self.file.name} can't be written ({error}); free some room and run the same command again."
            ) from error


class Wandb:
    """A mirror of the record in Weights & Biases; the run's id is kept in its folder, so that a resumed run goes on there.

    ``online`` needs a login and, without one, writes offline and says so. An offline run can't be resumed in place:
    each start writes a segment of its own, steps disjoint, for ``wandb sync`` to join.
    """

    def __init__(self, run: Path, config: Any) -> None:
        settings: WandbSettings = config.wandb
        self.run: Any = None
        if settings.mode == "off":
            return
        if settings.mode not in ("online", "offline"):
            raise Fault(f"wandb.mode is off, online or offline, not {settings.mode!r}.")
        import wandb

        mode = settings.mode
        if mode == "online" and not wandb.login(prompt=False):
            say("wandb: not logged in ('wandb login'), so this run is written offline; 'wandb sync' uploads it later")
            mode = "offline"
        path = run / "wandb_id.txt"
        if not path.exists():
            run_folder.write(path, secrets.token_hex(4))
        self.run = wandb.init(
            project=settings.project, name=run.name, id=path.read_text().strip(), resume="allow" if mode == "online" else None,
            mode=mode, dir=str(run), config=asdict(config),  # type: ignore[arg-type]
        )  # fmt: skip

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Mirror the figures of ``step``."""
        self._ask(lambda run: run.log(figures, step=step))

    def close(self) -> None:
        """Finish the segment."""
        self._ask(lambda run: run.finish())

    def _ask(self, act: Callable[[Any], None]) -> None:
        """A mirror that breaks is no reason to stop: W&B's own process ends by the SIGTERM with which a cluster asks for a checkpoint."""
        if self.run is None:
            return
        try:
            act(self.run)
        except OSError as error:
            self.run = None
            say(f"wandb: its process is gone ({error}), so what follows is in metrics.jsonl only")
