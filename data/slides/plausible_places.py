"""Can a file's coordinates be what they are said to be? Coordinates in cells, µm or pixels of another level look like
level-0 pixels.

What gives them away: neighbours that share most of their area, tiles beside the slide, numbers that no slide has.
"""

from pathlib import Path

import numpy as np

from data.fault import Fault
from data.slides.coordinates import FARTHEST

# Of the distance that neighbours should have: tiles of a grid are not that near, but those of coordinates in µm or
# cells.
TOO_NEAR = 0.55


def refuse_impossible(path: Path, coords: np.ndarray) -> None:
    """Raise Fault where some of ``coords`` (n, 2), in whatever unit, can't be places on a slide: not finite, negative,
    or farther out than any pixel."""
    if not np.isfinite(coords).all():
        raise Fault(f"{path} has coordinates that are not finite.")
    if coords.size and (coords.min() < 0 or coords.max() >= FARTHEST):
        negative = coords.min() < 0
        raise Fault(
            f"{path} has {'negative coordinates' if negative else 'coordinates'}"
            f" ({coords.min() if negative else coords.max():.6g}), where no slide has pixels: it is damaged, or of"
            " another format"
        )


def misread(coords: np.ndarray, side: float, *, width: int = 0, height: int = 0, apart: float = 1.0) -> str:
    """Why tiles of ``side`` level-0 pixels can't have their corners at ``coords`` (n, 2), taken for level-0 pixels, as
    the end of a sentence; or nothing.

    ``width, height``: of the slide, in level-0 pixels; 0 where they aren't known. ``apart``: how far neighbours should
    be from each other, in tiles: 1 of a grid, less of tiles that overlap.
    """
    if width and height and (outside := int(((coords[:, 0] >= width) | (coords[:, 1] >= height)).sum())):
        return (
            f"has {outside:,} of {len(coords):,} tiles beside its slide of {width} × {height} level-0 pixels, so it is"
            " of another slide, or its coordinates count something else"
        )
    if (step := commonest_step(coords)) is not None and step < TOO_NEAR * apart * side:
        return (
            f"has tiles of {side:g} level-0 pixels that are {step:g} apart, so they overlap, or its coordinates count"
            " something else, which it does not say"
        )
    return ""


def commonest_step(coords: np.ndarray) -> float | None:
    """The commonest distance of neighbours in a row, or in a column where no row has two."""
    for along, across in ((0, 1), (1, 0)):
        places = coords[np.lexsort((coords[:, along], coords[:, across]))].astype(np.float64)
        steps = np.diff(places[:, along])[np.diff(places[:, across]) == 0]
        if (steps := steps[steps > 0]).size:
            values, counts = np.unique(steps, return_counts=True)
            return float(values[counts.argmax()])
    return None
