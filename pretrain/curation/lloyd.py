"""k-means by Lloyd's rounds over rows that needn't fit in memory: each round goes once through them.

    assign    every row to its nearest centre           argmin_k |x − c_k|²
    average   every centre becomes the mean of its rows

A cluster that nobody is nearest to takes the row that lies farthest from its own centre, as scikit-learn's does. Beside a
chunk there are three times the centres in memory: what they were, sums in float64, and what they become.

Several processes go over rows of their own and add up their sums. These are of whole steps of 2⁻²⁴, of which every float16 is
so many, and float64 adds those exactly up to 2⁵³ of them: the same centres come out in whatever order, on however many.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.keyed import drawn, rng
from pretrain.curation.nearest import nearest_of_many
from pretrain.curation.own_rows import own_rows
from pretrain.curation.rows import MOST_ROWS, Rows, chunk_rows
from pretrain.run.across_ranks import add_up, end_to_end, from_first, own_rank

MOST_RELOCATED = 1024  # empty clusters that a round gives a row to
STARTED_AMONG = 8  # rows for each centre that the first centres are drawn among
STEPS = 2**24  # of a whole

Watched = Callable[[int, str], object]
"""Told of rows that were gone over, and in which round."""


@dataclass(frozen=True)
class Farthest:
    """The rows that lie farthest from their centres, the farthest first."""

    distances: Tensor  # (m,) squared
    labels: Tensor  # (m,)
    rows: Tensor  # (m, D)

    def with_those_of(self, distances: Tensor, labels: Tensor, rows: Tensor, most: int) -> "Farthest":
        """The same among these and others."""
        new = Farthest(distances, labels, rows).first(most)
        pairs = zip((self.distances, self.labels, self.rows), (new.distances, new.labels, new.rows), strict=True)
        return Farthest(*map(torch.cat, pairs)).first(most)

    def first(self, most: int) -> "Farthest":
        """The first of these, however they are ordered; of equals those that come first."""
        kept = self.distances.sort(descending=True, stable=True).indices[:most]
        return Farthest(self.distances[kept], self.labels[kept], self.rows[kept])

    def of_all_ranks(self, most: int) -> "Farthest":
        """The same among those of all processes."""
        return Farthest(end_to_end(self.distances), end_to_end(self.labels), end_to_end(self.rows)).first(most)


def whole_steps(rows: Tensor) -> Tensor:
    """Rows in steps of 2⁻²⁴, whole numbers as float64."""
    return rows.double().mul_(STEPS).round_()


def improved(rows: Rows, centres: Tensor, watched: Callable[[int], object]) -> tuple[Tensor, float]:
    """One round: the means (K, D) float32 of the rows that are nearest to each centre, and the rows' mean squared
    distance to those they had. All processes call it, each goes over its own rows, and all have the same."""
    count, width = centres.shape
    sums = torch.zeros(count, width, dtype=torch.float64, device=centres.device)
    sizes = torch.zeros(count, dtype=torch.int64, device=centres.device)
    apart = torch.zeros((), dtype=torch.float64, device=centres.device)
    most = min(count, MOST_RELOCATED)
    far = Farthest(centres.new_empty(0), sizes[:0], centres[:0])
    size = chunk_rows(count, width)
    for chunk in rows.chunks(size, *own_rows(len(rows), size)):
        labels, distances = nearest_of_many(chunk, centres)
        sums.index_add_(0, labels, whole_steps(chunk))
        sizes += torch.bincount(labels, minlength=count)
        apart += distances.double().sum()
        far = far.with_those_of(distances, labels, chunk, most)
        watched(len(chunk))
    add_up(sums, sizes, apart)
    empty = torch.nonzero(sizes == 0).flatten()[:most]
    if len(empty):
        far = far.of_all_ranks(most)
    for cluster, which in zip(empty.tolist(), range(len(far.distances)), strict=False):
        if far.distances[which] == 0:
            break  # fewer different rows than clusters
        own, row = int(far.labels[which]), whole_steps(far.rows[which])
        sums[own] -= row
        sizes[own] -= 1
        sums[cluster], sizes[cluster] = row, 1
    means = (sums / (sizes.clamp_min(1) * STEPS).unsqueeze(1)).float()
    return torch.where((sizes > 0).unsqueeze(1), means, centres), float(apart) / len(rows)


def first_centres(rows: Tensor, count: int, draw: np.random.Generator) -> Tensor:
    """``count`` of ``rows`` (n, D), n ≥ count, far from each other: each drawn with a chance that grows as the squared
    distance to those before it (k-means++)."""
    chosen = [int(draw.integers(len(rows)))]
    apart = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)
    squares = torch.cat([part.square().sum(dim=1) for part in rows.split(MOST_ROWS)])
    for _ in range(count - 1):
        last = squares + squares[chosen[-1]] - 2 * (rows @ rows[chosen[-1]])
        apart = torch.minimum(apart, last.clamp_min(0).double())
        ends = apart.cumsum(0)
        at = torch.searchsorted(ends, float(draw.random()) * ends[-1], right=True)
        chosen.append(min(int(at), len(rows) - 1))
    return rows[chosen].clone()


def fitted(rows: Rows, count: int, iterations: int, watched: Watched, *key: int | str) -> Tensor:
    """Centres (count, D) of rows, by at most so many rounds; what is drawn is drawn with ``key``. All processes call it,
    and begin with those that the first one drew."""
    centres = torch.empty(count, rows.width, device=rows.device)
    if own_rank() == 0:
        among = rows.only(drawn(len(rows), STARTED_AMONG * count, *key, "among"))
        read = torch.cat(list(among.chunks(chunk_rows(0, rows.width))))
        centres = first_centres(read, count, rng(*key, "first centres"))
    centres = from_first(centres)
    for number in range(iterations):
        words = f"round {number + 1} of at most {iterations}"
        better, _ = improved(rows, centres, lambda done, words=words: watched(done, words))  # type: ignore[misc]
        if torch.equal(better, centres):
            break
        centres = better
    return centres
