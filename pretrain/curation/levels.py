"""Hierarchical k-means with resampling: clusters of tiles, clusters of these, and so on (Vo et al., arXiv 2405.15613).

k-means puts more centres where there are more tiles. So at each level it is repeated on a few rows of every cluster, those
nearest to its centre: they are spread more evenly than the rows were, and so are the centres found among them. A level's
centres are the next one's rows.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pretrain.curation.lloyd import Watched, fitted
from pretrain.curation.nearest import nearest_of_many
from pretrain.curation.own_rows import own_rows
from pretrain.curation.rows import Rows, chunk_rows
from pretrain.run.across_ranks import end_to_end, world_size

FEWEST_NEAREST = 2  # rows of a cluster that are taken


def fitted_level(
    rows: Rows, count: int, *, iterations: int, steps: int, share: float, watched: Watched, key: tuple[int | str, ...]
) -> Tensor:
    """Centres (count, D) of rows: k-means, then ``steps`` times on the nearest rows of each cluster, as many as are
    ``share`` of the mean cluster's."""
    centres = fitted(rows, count, iterations, watched, *key, 0)
    each = max(FEWEST_NEAREST, round(share * len(rows) / count))
    for step in range(1, steps + 1):
        near = nearest_of_each(rows, centres, each, lambda done: watched(done, "nearest tiles of each cluster"))
        if len(near) < count:  # fewer different rows than clusters
            break
        centres = fitted(rows.only(near), count, iterations, watched, *key, step)
    return centres


def nearest_of_each(rows: Rows, centres: Tensor, each: int, watched: Callable[[int], object]) -> np.ndarray:
    """Numbers of the ``each`` rows of every cluster that are nearest to its centre, all where it has fewer; ascending
    int64. All processes call it, each goes over its own rows, and all have the same."""
    device, count = centres.device, len(centres)
    labels, distances = torch.empty(0, dtype=torch.int64, device=device), centres.new_empty(0)
    numbers, bounds, size = labels, torch.full((count,), torch.inf, device=device), chunk_rows(count, rows.width)
    first, last = own_rows(len(rows), size)
    for chunk in rows.chunks(size, first, last):
        own, apart = nearest_of_many(chunk, centres)
        closer = apart < bounds[own]  # than those that a full cluster has
        here = first + torch.arange(len(chunk), device=device)
        labels, distances, numbers = (
            torch.cat(pair) for pair in ((labels, own[closer]), (distances, apart[closer]), (numbers, here[closer]))
        )
        first += len(chunk)
        if len(labels) > 2 * each * count:
            labels, distances, numbers, bounds = _closest(labels, distances, numbers, each, count)
        watched(len(chunk))
    if world_size() > 1:
        labels, distances, numbers, _ = _closest(labels, distances, numbers, each, count)
        labels, distances, numbers = end_to_end(labels), end_to_end(distances), end_to_end(numbers)
    return _closest(labels, distances, numbers, each, count)[2].sort().values.cpu().numpy()


def _closest(labels: Tensor, distances: Tensor, numbers: Tensor, each: int, count: int) -> tuple[Tensor, ...]:
    """Of each label the ``each`` rows with the least distance, and how far the last of these is, infinity where there
    are fewer."""
    order = torch.argsort(distances, stable=True)
    order = order[torch.argsort(labels[order], stable=True)]
    labels, distances, numbers = labels[order], distances[order], numbers[order]
    sizes = torch.bincount(labels, minlength=count)
    place = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes)[labels]
    bounds = torch.full((count,), torch.inf, device=labels.device)
    last = place == each - 1
    bounds[labels[last]] = distances[last]
    kept = place < each
    return labels[kept], distances[kept], numbers[kept], bounds
