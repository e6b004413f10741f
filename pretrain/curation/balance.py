"""How many tiles are taken of each cluster: as equal as can be, from the top of the hierarchy down (arXiv 2405.15613).

The clusters of the top level share the wanted number equally. One that has fewer gives all, and the others share what is
left; each cluster's part is shared among those inside it by the same rule.
"""

import numpy as np

from data.keyed import rng


def levelled(most: np.ndarray, total: int, draw: np.random.Generator) -> np.ndarray:
    """Amounts (m,) int64 that sum to ``total``, as equal as ``most`` (m,) allows: ``min(most, level)``, and one more for
    some of those that have it, drawn. All of ``most`` where that is less."""
    if total >= most.sum():
        return most.astype(np.int64)
    low, high = 0, int(most.max())  # the level lies in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        if int(np.minimum(most, middle).sum()) <= total:
            low = middle
        else:
            high = middle
    amounts = np.minimum(most, low).astype(np.int64)
    more = draw.choice(np.flatnonzero(most > low), total - int(amounts.sum()), replace=False)
    amounts[more] += 1
    return amounts


def balanced(
    sizes: list[np.ndarray], parents: list[np.ndarray], total: int, repeats: int, seed: int
) -> list[np.ndarray]:
    """Tiles to take of each cluster, a list of int64 arrays, level by level from the finest.

    sizes: how many tiles each cluster has, level by level, (K₁,), (K₂,) …; ``parents[l]`` (K_l,): which cluster above
    each one of level l lies in; repeats: how often a tile may count.
    """
    most = [of_level.astype(np.int64) * repeats for of_level in sizes]
    amounts = [levelled(most[-1], total, rng(seed, "balance", len(parents)))]
    for level in reversed(range(len(parents))):
        found = np.zeros(len(most[level]), dtype=np.int64)
        order = np.argsort(parents[level], kind="stable")
        ends = np.cumsum(np.bincount(parents[level], minlength=len(most[level + 1])))
        for cluster, inside in enumerate(np.split(order, ends[:-1])):
            if len(inside):
                draw = rng(seed, "balance", level, cluster)
                found[inside] = levelled(most[level][inside], int(amounts[0][cluster]), draw)
        amounts.insert(0, found)
    return amounts


class Lots:
    """Which tiles of each cluster are taken, drawn while they pass by: every choice of as many is as likely.

    ``sizes`` (K,) tiles of the clusters, ``amounts`` (K,) how often these are to count together.
    """

    def __init__(self, sizes: np.ndarray, amounts: np.ndarray) -> None:
        self.whole, self.more = amounts // np.maximum(sizes, 1), amounts % np.maximum(sizes, 1)
        self.left = sizes.copy()

    def weights(self, clusters: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """How often the next tiles count, (n,) int64, of the clusters (n,) that they are in."""
        present, own = np.unique(clusters, return_inverse=True)
        here = np.bincount(own)
        taken = draw.hypergeometric(self.more[present], self.left[present] - self.more[present], here)
        self.more[present] -= taken
        self.left[present] -= here
        order = np.lexsort((draw.random(len(own)), own))
        place = np.arange(len(own)) - np.repeat(np.cumsum(here) - here, here)
        weights = self.whole[clusters]
        weights[order] += place < taken[own[order]]
        return weights
