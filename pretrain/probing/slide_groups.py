"""Which labelled images are of one patient or slide, so that a split keeps them together.

Tiles of one slide are alike in stain, scanner and focus. With some of them on each side of a split, recognising the
slide passes for recognising the tissue, and of two encoders the one that learned slides looks better.

What says it: a table of the user's (`pretrain.probing.slide_table`), and nothing else where there is one; the files'
names (`pretrain.probing.slide_names`); or likeness (`pretrain.probing.likeness`), which is a guess.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data.fault import Fault
from pretrain.probing.grouping import Groups
from pretrain.probing.likeness import by_likeness
from pretrain.probing.slide_names import by_name
from pretrain.probing.slide_table import by_table


def groupings(
    files: list[Path], folder: Path, table: Path | None, images: Iterable[np.ndarray | Fault]
) -> Iterator[Groups]:
    """Groups of the image files below ``folder``, the surest first. ``images``: their pixels, uint8 (height, width, 3),
    or why they can't be had; gone through only where likeness is asked for.

    Raises Fault as `by_table` does.
    """
    if table is not None:
        yield by_table(files, folder, table)
        return
    if (named := by_name(files, folder)) is not None:
        yield named
    yield by_likeness(images, len(files))


def groups_of(files: list[Path], folder: Path, table: Path | None, images: Iterable[np.ndarray | Fault]) -> Groups:
    """The first of `groupings`."""
    return next(groupings(files, folder, table, images))
