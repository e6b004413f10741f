"""Clusters of a store's tiles, whose numbers a masked tile can be predicted as: k-means of standardised embeddings,
fitted once when a run prepares itself."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import write_whole
from data.keyed import drawn, rng

SLIDES_READ, TILES_READ = 2048, 2**16  # at most: k-means of more gives no other clusters


def fit_clusters(
    store: EmbeddingStore,
    statistics: Statistics,
    count: int,
    seed: int,
    watched: Callable[[list[str]], Iterable[str]] = iter,
) -> np.ndarray:
    """Centres ``(count, width)`` float32 of the store's tiles, standardised, by a sample of them that ``seed`` draws,
    as many of each slide. Raises Fault where there are fewer tiles than clusters."""
    from sklearn.cluster import MiniBatchKMeans  # takes a second to import, and few runs need it

    filled = [slide for slide in store.slides if store.rows(slide)]
    slides = [filled[number] for number in drawn(len(filled), SLIDES_READ, seed, "slides of clusters")]
    each, sample = -(-TILES_READ // max(1, len(slides))), []
    for slide in watched(slides):
        rows = drawn(store.rows(slide), each, seed, "tiles of clusters", slide)
        sample.append((store.read(slide).embeddings[rows] - statistics.mean) / statistics.std)
    tiles = np.concatenate(sample).astype(np.float32) if sample else np.empty((0, store.width), np.float32)
    if len(tiles) < count:
        raise Fault(
            f"{store.folder} has {len(tiles)} tiles to find objective.clusters={count} among: ask for fewer, or embed"
            " more slides."
        )
    draw = int(rng(seed, "clusters").integers(2**31))
    found = MiniBatchKMeans(count, n_init=3, random_state=draw).fit(tiles)
    return np.asarray(found.cluster_centers_, dtype=np.float32)


def save_clusters(path: Path, centres: np.ndarray) -> None:
    """Write them as a table of numbers, exactly."""
    write_whole(path, "\n".join(" ".join(map(repr, row.tolist())) for row in centres) + "\n")


def load_clusters(path: Path) -> np.ndarray:
    """Read what `save_clusters` wrote. Raises Fault where it is damaged."""
    try:
        return np.loadtxt(path, dtype=np.float32, ndmin=2)
    except ValueError as error:
        raise Fault(f"{path} is damaged ({error}): delete it, and the same command makes it anew.") from error
