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
    ``seen``; without ``clusters`` no means of these. Differentiable by ``seen``."""
    assert seen.pooled_layers is not None and seen.cls_layers is not None
    sizes = list(lengths)
    precise = torch.promote_types(seen.tiles.dtype, torch.float32)
    slides = seen.tiles.to(precise).split(sizes)
    found = {
        "pooled": seen.pooled,
        "mean_std": torch.stack([torch.cat([tiles.mean(dim=0), deviation(tiles)]) for tiles in slides]),
        "pooled_layers": seen.pooled_layers.transpose(0, 1).flatten(1),
        "cls": seen.cls,
        "cls_layers": seen.cls_layers.transpose(0, 1).flatten(1),
    }
    if clusters is not None:
        members, number = clusters.of(x).split(sizes), len(clusters.centres)
        by_cluster = [means_within(tiles, of, number) for tiles, of in zip(slides, members, strict=True)]
        found["cluster_means"] = torch.stack(by_cluster)
    return {name: vectors.to(precise) for name, vectors in found.items()}


def means_within(tiles: Tensor, members: Tensor, clusters: int) -> Tensor:
    """Of tiles (n, D), the mean of each cluster's ``members`` (n,), or of all where it has none: (clusters · D)."""
    sums = tiles.new_zeros(clusters, tiles.shape[1]).index_add(0, members, tiles)
    counts = torch.bincount(members, minlength=clusters)[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), tiles.mean(dim=0)).flatten()


def deviation(tiles: Tensor) -> Tensor:
    """The standard deviation (D,) of tiles (n, D) around their mean; the bound keeps its gradient finite where all are
    alike."""
    return tiles.var(dim=0, correction=0).clamp(min=torch.finfo(tiles.dtype).tiny).sqrt()
