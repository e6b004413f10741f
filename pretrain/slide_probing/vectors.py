"""One vector a slide: of its tiles alone, with nothing learned, or of what a slide encoder makes of them."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from data.embeddings.store import EmbeddingStore, SlideEmbeddings
from data.fault import Fault
from models.slide_network import SlideNetwork
from pretrain.embedding.poolings import pooled_vectors
from pretrain.embedding.slides import packed, seen_by
from pretrain.embedding.tile_clusters import TileClusters
from pretrain.encoders.slide_encoders import SlideEncoder

SMOOTHED = (1.0, 2.0)  # cells: standard deviations of the filters
SMOOTHED_AT_ONCE = 64  # smoothed at a time: a slide's bounding box of cells is filled with zeros
POOLING_WORDS = {
    "mean": "pooled",
    "mean + std": "mean_std",
    "per-cluster means": "cluster_means",
    "moments by cluster": "cluster_moments",
    "all layers": "pooled_layers",
    "class token": "cls",
}  # as a row is called → as `pooled_vectors` calls it
DEFAULT_POOLING = "moments by cluster"  # of 'pretrain embed stage=slide'

Vectors = dict[str, np.ndarray]
"""Per row of the table, ``(slides, D)`` float32."""


def of_tiles_alone(slides: Iterator[SlideEmbeddings]) -> Vectors:
    """Vectors that need no slide encoder: the mean of the tiles; with their standard deviation; and with those of
    spatially smoothed tiles (σ of 1 and 2 cells), which tell how tiles are arranged."""
    found: dict[str, list[np.ndarray]] = {"mean of tiles": [], "mean + std": [], "mean + std + smoothed std": []}
    for slide in slides:
        tiles = np.asarray(slide.embeddings, dtype=np.float32)
        if not np.isfinite(tiles).all():
            raise Fault(f"embeddings of {slide.slide} are not finite: embed it again into a new folder.")
        mean = tiles.mean(axis=0)
        both = np.concatenate([mean, tiles.std(axis=0)])
        found["mean of tiles"].append(mean)
        found["mean + std"].append(both)
        found["mean + std + smoothed std"].append(
            np.concatenate([both, *(smoothed(tiles, slide.cells, sigma).std(axis=0) for sigma in SMOOTHED)])
        )
    return {name: np.stack(rows) for name, rows in found.items()}


def smoothed(tiles: np.ndarray, cells: np.ndarray, sigma: float) -> np.ndarray:
    """Each tile's mean over its neighbourhood, weighted by a Gaussian of ``sigma`` cells: ``G(x · m) / G(m)`` with the
    mask m of cells that have a tile; tiles (n, D), cells (n, 2)."""
    column, row = (cells - cells.min(axis=0)).T
    box = (int(row.max()) + 1, int(column.max()) + 1)
    mask = np.zeros(box, np.float32)
    mask[row, column] = 1
    weight = gaussian_filter(mask, sigma, mode="constant")[row, column]
    found = np.empty_like(tiles)
    for start in range(0, tiles.shape[1], SMOOTHED_AT_ONCE):
        some = slice(start, start + SMOOTHED_AT_ONCE)
        filled = np.zeros((*box, tiles[:, some].shape[1]), np.float32)
        filled[row, column] = tiles[:, some]
        found[:, some] = gaussian_filter(filled, (sigma, sigma, 0), mode="constant")[row, column] / weight[:, None]
    return found


def of_encoder(
    store: EmbeddingStore,
    slides: Sequence[str],
    encoder: SlideEncoder,
    network: SlideNetwork,
    clusters: TileClusters,
    *,
    tokens: int,
    precision: str,
    advance: Callable[[int], None],
) -> Vectors:
    """Per pooling of `POOLING_WORDS` what ``network``, on the encoder's device, makes of each slide; ``advance`` is told of
    slides that are done."""
    found: dict[str, list[np.ndarray]] = {words: [] for words in POOLING_WORDS}
    for batch in packed(store, slides, tokens):
        x, lengths, seen = seen_by(network, batch, encoder.device, precision)
        vectors = pooled_vectors(x, lengths, seen, clusters)
        for words, name in POOLING_WORDS.items():
            found[words].append(vectors[name].cpu().numpy())
        advance(len(batch))
    return {words: np.concatenate(rows) for words, rows in found.items()}


def of_bags(vectors: np.ndarray, slides: Sequence[str], bags: Sequence[Sequence[str]]) -> np.ndarray:
    """The mean of each bag's slides, ``(bags, D)``."""
    place = {slide: i for i, slide in enumerate(slides)}
    return np.stack([vectors[[place[slide] for slide in bag]].mean(axis=0) for bag in bags])
