"""An exported folder appears under its name once it is whole, with a card that says what it came of."""

import filecmp
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.fault import Fault
from data.files import make_folder, refusals
from data.redaction import redacted


@dataclass(frozen=True)
class Exported:
    """``new``: whether it was written now, or was there already; ``checked``: what was; ``use``: code that loads it;
    ``difference``: of the features of what was loaded back, see `largest_difference`."""

    new: bool
    checked: str
    use: str
    difference: float = 0.0


def publish(out: Path, fill: Callable[[Path], None]) -> bool:
    """Let ``fill`` write a folder beside ``out`` and give it that name when it is whole; a kill leaves ``out`` as it
    was.

    False when ``out`` already holds the very same files. Raises `Fault` when it holds anything else.
    """
    temporary = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    try:
        with refusals(out):
            fill(temporary)
        names = sorted(path.name for path in temporary.iterdir())
        if out.exists() and any(out.iterdir()):
            there = sorted(path.name for path in out.iterdir())
            if there != names or filecmp.cmpfiles(out, temporary, names, shallow=False)[0] != names:
                raise Fault(f"{out} already holds something else: choose another out=, or remove it")
            return False
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.rename(out)
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def provenance(run: Path) -> str:
    """The run's ``provenance.json`` as a section of the card, empty where the run has none."""
    path = run / "provenance.json"
    return f"\nProvenance:\n\n```json\n{redacted(path.read_text().strip())}\n```\n\n" if path.is_file() else "\n"
