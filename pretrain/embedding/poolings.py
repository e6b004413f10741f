"""A slide encoder's outputs become one vector a slide, in several ways: see `data.embeddings.slide_features`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.slide_network import SlideFeatures
from pretrain.embedding.tile_clusters import TileClusters


def pooled_vectors(
    x: Tensor, lengths: Sequence[int], seen: SlideFeatures, clusters: TileClusters | None
) -> dict[str, Tensor]:
    """By pooling, (B, dimensions) float32 or better, of slides of ``lengths`` tiles ``x`` (T, D) with all layers
    ``seen``; without ``clusters`` nothing of these. Differentiable by ``seen``."""
    assert seen.pooled_layers is not None and seen.cls_layers is not None
    sizes = list(lengths)
    precise = torch.promote_types(seen.tiles.dtype, torch.float32)
    slides = seen.tiles.to(precise).split(sizes)
    found = {
        "pooled": seen.pooled,
        "mean_std": torch.stack([mean_and_deviation(tiles) for tiles in slides]),
        "pooled_layers": seen.pooled_layers.transpose(0, 1).flatten(1),
        "cls": seen.cls,
        "cls_layers": seen.cls_layers.transpose(0, 1).flatten(1),
    }
    if clusters is not None:
        number, of_each = len(clusters.centres), zip(slides, clusters.of(x).split(sizes), strict=True)
        means, parts = zip(*(by_members(tiles, members, number) for tiles, members in of_each), strict=True)
        found["cluster_means"] = torch.stack(means).flatten(1)
        found["cluster_moments"] = torch.cat([found["mean_std"], torch.stack(parts).flatten(1)], dim=1)
    return {name: vectors.to(precise) for name, vectors in found.items()}


def by_members(tiles: Tensor, members: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Of tiles (n, D) in ``number`` clusters, ``members`` (n,) int64: each one's mean (number, D), that of all tiles
    where it has none; and (2, number, D), its sum over n, and the root of its squares around its mean over n."""
    sums = tiles.new_zeros(number, tiles.shape[1]).index_add(0, members, tiles)
    counts = torch.bincount(members, minlength=number)[:, None]
    means = sums / counts.clamp(min=1)
    away = torch.zeros_like(sums).index_add(0, members, (tiles - means[members]).square())
    spreads = (away / len(tiles)).clamp(min=torch.finfo(tiles.dtype).tiny).sqrt()
    return torch.where(counts > 0, means, tiles.mean(dim=0)), torch.stack([sums / len(tiles), spreads])


def mean_and_deviation(tiles: Tensor) -> Tensor:
    """The mean of tiles (n, D) and their `deviation`, (2 D,)."""
    return torch.cat([tiles.mean(dim=0), deviation(tiles)])


def deviation(tiles: Tensor) -> Tensor:
    """The standard deviation (D,) of tiles (n, D) around their mean; the bound keeps its gradient finite where all are
    alike."""
    return tiles.var(dim=0, correction=0).clamp(min=torch.finfo(tiles.dtype).tiny).sqrt()
