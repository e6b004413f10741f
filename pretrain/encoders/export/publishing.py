"""What an export says of itself: what was checked, and how it is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exported:
    """``new``: whether it was written now, or was there already; ``checked``: what was; ``use``: code that loads it;
    ``difference``: of the features of what was loaded back, see `largest_difference`."""

    new: bool
    checked: str
    use: str
    difference: float = 0.0
