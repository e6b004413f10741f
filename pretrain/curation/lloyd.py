"""k-means by Lloyd's rounds over rows that needn't fit in memory: each round goes once through them.

    assign    every row to its nearest centre           argmin_k |x − c_k|²
    average   every centre becomes the mean of its rows

A cluster that nobody is nearest to takes the row that lies farthest from its own centre, as scikit-learn's does. Beside a
chunk there are three times the centres in memory: what they were, sums in float64, and what they become.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.keyed import drawn, rng
from pretrain.curation.rows import MOST_ROWS, Rows, chunk_rows

MOST_RELOCATED = 1024  # empty clusters that a round gives a row to
STARTED_AMONG = 8  # rows for each centre that the first centres are drawn among

Watched = Callable[[int, str], object]
"""Told of rows that were gone over, and in which round."""


def assigned(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) and (K, D) → the nearest centre of each, (n,) int64, and its squared distance, (n,) float32."""
    half = centres.square().sum(dim=1) / 2
    least, labels = (half - rows @ centres.T).min(dim=1)
    return labels, (2 * least + rows.square().sum(dim=1)).clamp_min(0)


@dataclass(frozen=True)
class Farthest:
    """The rows that lie farthest from their centres, the farthest first."""

    distances: Tensor  # (m,) squared
    labels: Tensor  # (m,)
    rows: Tensor  # (m, D)

    def with_those_of(self, distances: Tensor, labels: Tensor, rows: Tensor, most: int) -> "Farthest":
        """The same among these and others."""
        kept = distances.topk(min(most, len(distances))).indices
        distances, labels, rows = (
            torch.cat(pair)
            for pair in (
                (self.distances, distances[kept]),
                (self.labels, labels[kept]),
                (self.rows, rows[kept]),
            )
        )
        kept = distances.topk(min(most, len(distances))).indices
        return Farthest(distances[kept], labels[kept], rows[kept])


def improved(rows: Rows, centres: Tensor, watched: Callable[[int], object]) -> tuple[Tensor, float]:
    """One round: the means (K, D) float32 of the rows that are nearest to each centre, and the rows' mean squared
    distance to those they had."""
    count, width = centres.shape
    sums = torch.zeros(count, width, dtype=torch.float64, device=centres.device)
    sizes = torch.zeros(count, dtype=torch.int64, device=centres.device)
    total = torch.zeros((), dtype=torch.float64, device=centres.device)
    most = min(count, MOST_RELOCATED)
    far = Farthest(centres.new_empty(0), sizes[:0], centres[:0])
    for chunk in rows.chunks(chunk_rows(count, width)):
        labels, distances = assigned(chunk, centres)
        sums.index_add_(0, labels, chunk.double())
        sizes += torch.bincount(labels, minlength=count)
        total += distances.double().sum()
        far = far.with_those_of(distances, labels, chunk, most)
        watched(len(chunk))
    empty = torch.nonzero(sizes == 0).flatten()[:most]
    for cluster, which in zip(empty.tolist(), range(len(far.distances)), strict=False):
        if far.distances[which] == 0:
            break  # fewer different rows than clusters
        own, row = int(far.labels[which]), far.rows[which].double()
        sums[own] -= row
        sizes[own] -= 1
        sums[cluster], sizes[cluster] = row, 1
    means = (sums / sizes.clamp_min(1).unsqueeze(1)).float()
    return torch.where((sizes > 0).unsqueeze(1), means, centres), float(total) / len(rows)


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
    """Centres (count, D) of rows, by at most so many rounds; what is drawn is drawn with ``key``."""
    among = rows.only(drawn(len(rows), STARTED_AMONG * count, *key, "among"))
    centres = first_centres(torch.cat(list(among.chunks(chunk_rows(0, rows.width)))), count, rng(*key, "first centres"))
    for number in range(iterations):
        words = f"round {number + 1} of at most {iterations}"
        better, _ = improved(rows, centres, lambda done, words=words: watched(done, words))  # type: ignore[misc]
        if torch.equal(better, centres):
            break
        centres = better
    return centres
