"""Clusters of a store's tiles by k-means; those whose numbers a masked tile can be predicted as are of standardised
embeddings, fitted once when a run prepares itself."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import write_whole
from data.keyed import drawn, rng

SLIDES_READ, TILES_READ = 2048, 2**16  # at most: k-means of more gives no other clusters
COMPARED_AT_ONCE = 2**14  # tiles


def fit_clusters(
    store: EmbeddingStore,
    statistics: Statistics,
    count: int,
    seed: int,
    watched: Callable[[list[str]], Iterable[str]] = iter,
) -> np.ndarray:
    """Centres ``(count, width)`` float32 of the store's tiles, standardised, by a sample of them that ``seed`` draws,
    as many of each slide. Raises Fault where there are fewer tiles than clusters."""
    filled = [slide for slide in store.slides if store.rows(slide)]
    slides = [filled[number] for number in drawn(len(filled), SLIDES_READ, seed, "slides of clusters")]
    tiles = sampled_tiles(store, watched(slides), -(-TILES_READ // max(1, len(slides))), seed)
    if len(tiles) < count:
        raise Fault(
            f"{store.folder} has {len(tiles)} tiles to find objective.clusters={count} among: ask for fewer, or embed"
            " more slides."
        )
    return k_means(((tiles - statistics.mean) / statistics.std).astype(np.float32), count, seed)


def sampled_tiles(store: EmbeddingStore, slides: Iterable[str], each: int, seed: int) -> np.ndarray:
    """``each`` of a slide's tiles, or all where it has fewer, drawn by ``seed``: (n, width) float16."""
    empty = np.empty((0, store.width), np.float16)
    return np.concatenate(
        [
            empty,
            *(
                store.read(slide).embeddings[drawn(store.rows(slide), each, seed, "tiles of clusters", slide)]
                for slide in slides
            ),
        ]
    )


def k_means(tiles: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centres ``(count, width)`` float32 of tiles (n, width) float32."""
    from sklearn.cluster import MiniBatchKMeans  # takes a second to import, and few runs need it

    draw = int(rng(seed, "clusters").integers(2**31))
    found = MiniBatchKMeans(count, n_init=3, random_state=draw).fit(tiles)
    return np.asarray(found.cluster_centers_, dtype=np.float32)


def nearest_centres(tiles: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) and (K, D) → the nearest centre of each, (n,) int64, and its squared distance, (n,), as
    |x|² + 2 min_k (|c_k|² / 2 − c_k·x)."""
    half = centres.square().sum(dim=1) / 2
    found = [(half - some @ centres.T).min(dim=1) for some in tiles.split(COMPARED_AT_ONCE)]
    least, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return labels, (2 * least + tiles.square().sum(dim=1)).clamp_min(0)


def save_clusters(path: Path, centres: np.ndarray) -> None:
    """Write them as a table of numbers, exactly."""
    write_whole(path, "\n".join(" ".join(map(repr, row.tolist())) for row in centres) + "\n")


def load_clusters(path: Path) -> np.ndarray:
    """Read what `save_clusters` wrote. Raises Fault where it is damaged."""
    try:
        return np.loadtxt(path, dtype=np.float32, ndmin=2)
    except ValueError as error:
        raise Fault(f"{path} is damaged ({error}): delete it, and the same command makes it anew.") from error
