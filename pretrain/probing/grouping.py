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

    @property
    def kind(self) -> str:
        """What the groups are, in a word: patients, where that is what ``how`` begins with, or slides."""
        return "patients" if self.how.startswith("patients") else "slides"

    @property
    def all_of_one(self) -> bool:
        """Whether it is known that there is but one."""
        return self.known and int(self.of.max()) == 0


def numbered(names: Iterable[str]) -> np.ndarray:
    """A number for each name, int64 (n,): the same for equal names, from 0."""
    return np.unique(list(names), return_inverse=True)[1].astype(np.int64)


def joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The finest groups that keep together whatever either of two groupings does, each int64 (n,) from 0."""
    first, second = int(one.max()) + 1, int(other.max()) + 1
    return connected(one, first + other, first + second)[one]


def connected(one: np.ndarray, other: np.ndarray, count: int) -> np.ndarray:
    """A number for each of ``count`` things, int64 from 0: the same where pairs (``one[i]``, ``other[i]``) lead from one
    to another."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = coo_array((np.ones(len(one)), (one, other)), shape=(count, count))
    return connected_components(pairs, directed=False)[1].astype(np.int64)
