"""One vector a slide: of its tiles alone, with nothing learned, or of what a slide encoder makes of them."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy

import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.cluster import MiniBatchKMeans

from data.embeddings.store import EmbeddingStore, SlideEmbeddings
from data.fault import Fault
from data.keyed import rng
from models.initialise import initialise
from models.slide_network import SlideNetwork
from pretrain.embedding.slides import packed, seen_by
from pretrain.encoders.slide_encoders import SlideEncoder

SMOOTHED = (1.0, 2.0)  # cells: standard deviations of the filters
SMOOTHED_AT_ONCE = 64  # smoothed at a time: a slide's bounding box of cells is filled with zeros
CLUSTERS = 8
SAMPLED = 50  # tiles of a slide that clusters are found by
POOLINGS = ("mean", "mean + std", "per-cluster means", "all layers", "class token")

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


def clusters_of(store: EmbeddingStore, slides: Sequence[str], seed: int) -> MiniBatchKMeans:
    """k-means of `CLUSTERS` groups of tiles, by a sample of each slide's."""
    sample = []
    for slide in slides:
        tiles = store.read(slide).embeddings
        chosen = rng(seed, "tiles of clusters", slide).permutation(len(tiles))[:SAMPLED]
        sample.append(np.asarray(tiles[np.sort(chosen)], dtype=np.float32))
    tiles = np.concatenate(sample)
    draw = int(rng(seed, "clusters").integers(2**31))
    return MiniBatchKMeans(min(CLUSTERS, len(tiles)), n_init=3, random_state=draw).fit(tiles)


def of_encoder(
    store: EmbeddingStore,
    slides: Sequence[str],
    encoder: SlideEncoder,
    network: SlideNetwork,
    clusters: MiniBatchKMeans,
    *,
    tokens: int,
    precision: str,
    advance: Callable[[int], None],
) -> Vectors:
    """Per pooling of `POOLINGS` what ``network``, on the encoder's device, makes of each slide; ``advance`` is told of
    slides that are done."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in POOLINGS}
    for batch in packed(store, slides, tokens):
        x, lengths, seen = seen_by(network, batch, encoder.device, precision)
        assert seen.pooled_layers is not None
        layers = seen.pooled_layers.transpose(0, 1).flatten(1).float().cpu().numpy()
        of_cluster = np.split(clusters.predict(x.cpu().numpy()), np.cumsum(lengths)[:-1])
        pooled, cls = seen.pooled.float().cpu().numpy(), seen.cls.float().cpu().numpy()
        for i, tiles in enumerate(np.split(seen.tiles.float().cpu().numpy(), np.cumsum(lengths)[:-1])):
            mean = tiles.mean(axis=0)
            members = [tiles[of_cluster[i] == one] for one in range(clusters.n_clusters)]
            found["mean"].append(pooled[i])
            found["mean + std"].append(np.concatenate([mean, tiles.std(axis=0)]))
            found["per-cluster means"].append(
                np.concatenate([some.mean(axis=0) if len(some) else mean for some in members])
            )
            found["all layers"].append(layers[i])
            found["class token"].append(cls[i])
        advance(len(batch))
    return {name: np.stack(rows) for name, rows in found.items()}


def with_random_weights(encoder: SlideEncoder, seed: int) -> SlideNetwork:
    """The encoder's network with random weights, whose residual branches start at full strength: at the small start
    that training may have chosen it would hand its input through."""
    network = deepcopy(encoder.network)
    network.initial_residual = 1.0
    initialise(network, seed, "encoder")
    return network


def of_bags(vectors: np.ndarray, slides: Sequence[str], bags: Sequence[Sequence[str]]) -> np.ndarray:
    """The mean of each bag's slides, ``(bags, D)``."""
    place = {slide: i for i, slide in enumerate(slides)}
    return np.stack([vectors[[place[slide] for slide in bag]].mean(axis=0) for bag in bags])
