"""A group for each image: what is of one patient or slide stays on one side of a split."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Groups:
    """A group for each of n images, and what they are: ``patients of slides.csv``."""

    of: np.ndarray  # int64 (n,), from 0
    how: str
    known: bool  # False where it is a guess


def numbered(names: Iterable[str]) -> np.ndarray:
    """A number for each name, int64 (n,): the same for equal names, from 0."""
    return np.unique(list(names), return_inverse=True)[1].astype(np.int64)


def joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The finest groups that keep together whatever either of two groupings does, each int64 (n,) from 0."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = int(one.max()) + 1, int(other.max()) + 1
    edges = coo_array((np.ones(len(one)), (one, first + other)), shape=(first + second,) * 2)
    return connected_components(edges, directed=False)[1][one].astype(np.int64)
