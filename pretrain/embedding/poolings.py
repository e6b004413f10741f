"""A slide encoder's outputs become one vector a slide, in several ways: see `data.embeddings.slide_features`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.slide_network import SlideFeatures
from pretrain.embedding.tile_clusters import TileClusters


def pooled_vectors(x: Tensor, lengths: Sequence[int], seen: SlideFeatures, clusters: TileClusters) -> dict[str, Tensor]:
    """By pooling, (B, dimensions) float32, of slides of ``lengths`` tiles ``x`` (T, D) with all layers ``seen``;
    differentiable."""
    assert seen.pooled_layers is not None and seen.cls_layers is not None
    both, by_cluster = [], []
    sizes = list(lengths)
    for tiles, members in zip(seen.tiles.float().split(sizes), clusters.of(x).split(sizes), strict=True):
        mean = tiles.mean(dim=0)
        both.append(mean_and_deviation(tiles))
        number = len(clusters.centres)
        sums = tiles.new_zeros(number, tiles.shape[1]).index_add(0, members, tiles)
        counts = torch.bincount(members, minlength=number)[:, None]
        by_cluster.append(torch.where(counts > 0, sums / counts.clamp(min=1), mean).flatten())
    return {
        "pooled": seen.pooled.float(),
        "mean_std": torch.stack(both),
        "cluster_means": torch.stack(by_cluster),
        "pooled_layers": seen.pooled_layers.transpose(0, 1).flatten(1).float(),
        "cls": seen.cls.float(),
        "cls_layers": seen.cls_layers.transpose(0, 1).flatten(1).float(),
    }


def mean_and_deviation(tiles: Tensor) -> Tensor:
    """The mean of tiles (n, D) and their `deviation`, (2 D,)."""
    return torch.cat([tiles.mean(dim=0), deviation(tiles)])


def deviation(tiles: Tensor) -> Tensor:
    """The standard deviation (D,) of tiles (n, D) around their mean; the bound keeps its gradient finite where all are
    alike."""
    return tiles.var(dim=0, correction=0).clamp(min=torch.finfo(tiles.dtype).tiny).sqrt()
