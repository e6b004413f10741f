"""What an export says of itself: what was checked, how it is loaded, and on its card what it came of."""

from dataclasses import dataclass
from pathlib import Path

from data.redaction import redacted


@dataclass(frozen=True)
class Exported:
    """``new``: whether it was written now, or was there already; ``checked``: what was; ``use``: code that loads it;
    ``difference``: of the features of what was loaded back, see `largest_difference`."""

    new: bool
    checked: str
    use: str
    difference: float = 0.0


def provenance(run: Path) -> str:
    """The run's ``provenance.json`` as a section of the card, empty where the run has none."""
    path = run / "provenance.json"
    return f"\nProvenance:\n\n```json\n{redacted(path.read_text().strip())}\n```\n\n" if path.is_file() else "\n"
