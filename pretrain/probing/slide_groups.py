"""Which labelled images are of one patient or slide, so that a split keeps them together.

Tiles of one slide are alike in stain, scanner and focus. With some of them on each side of a split, recognising the
slide passes for recognising the tissue, and of two encoders the one that learned slides looks better.

What says it: a table of the user's (`pretrain.probing.slide_table`), and nothing else where there is one; the files'
names (`pretrain.probing.slide_names`), with copies of one tile kept together whatever these say; or likeness
(`pretrain.probing.likeness`), which is a guess.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.fault import Fault
from pretrain.probing.grouping import Groups
from pretrain.probing.likeness import THUMBNAIL_SIDE, by_likeness, thumbnail_of, with_copies
from pretrain.probing.slide_names import by_name
from pretrain.probing.slide_table import by_table
from pretrain.run.progress import track

MOST_COMPARED = 20_000  # images, each with each, half a minute

ImagesOrWhyNot = Iterable[np.ndarray | Fault]
"""Of images uint8 (height, width, 3), or why they can't be had."""


def groupings(
    files: list[Path], folder: Path, table: Path | None, images: Callable[[], ImagesOrWhyNot]
) -> Iterator[Groups]:
    """Groups of the image files below ``folder``, the surest first; ``images``: begins to read them.

    Raises Fault as `by_table` does.
    """
    if table is not None:
        yield by_table(files, folder, table)
        return
    if (named := by_name(files, folder)) is not None:
        if len(files) > MOST_COMPARED:
            yield replace(named, how=f"{named.how}; too many images to look for copies among them")
        else:
            looked_at = track(images(), len(files), "looking for copies", "images")
            yield with_copies(named, np.stack([thumbnail_or_none(one) for one in looked_at]))
    yield by_likeness(images(), len(files))


def thumbnail_or_none(image: np.ndarray | Fault) -> np.ndarray:
    """`thumbnail_of` an image, and that of a flat one where it can't be had."""
    return np.zeros(THUMBNAIL_SIDE**2) if isinstance(image, Fault) else thumbnail_of(image)


def groups_of(files: list[Path], folder: Path, table: Path | None, images: Callable[[], ImagesOrWhyNot]) -> Groups:
    """The first of `groupings`."""
    return next(groupings(files, folder, table, images))
