"""What a masked tile is predicted as, and how far off a prediction is: tables of what settings choose from.

Judging reads every prediction as something that R² and its baselines are known of, so that runs with different targets
can be compared: standardised embeddings, but for `layer_norm`, which none can be read off.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.embeddings.clusters import nearest_centres
from data.embeddings.sequences import SlideBatch
from pretrain.objectives.losses.precision import at_least_float32


class SlideTarget(NamedTuple):
    """``of``: (T, D) of all tiles, or (T,) numbers of their clusters: what is learned. ``judged``: (T, D) what R² is
    of. ``read``: predictions (M, D or K) as such."""

    of: Callable[[SlideBatch], Tensor]
    judged: Callable[[SlideBatch], Tensor]
    read: Callable[[Tensor, SlideBatch], Tensor]


class TileLoss(NamedTuple):
    """``of``: predictions and targets of M tiles → (M,). ``complete``: predictions (M, D), with what a loss leaves
    open, by the targets (T, D) of visible tiles alone."""

    of: Callable[[Tensor, Tensor], Tensor]
    complete: Callable[[Tensor, Tensor, SlideBatch], Tensor]


def as_stored(batch: SlideBatch) -> Tensor:
    """(T, D) float32 embeddings, without any scaling: dimensions that vary much count much."""
    return at_least_float32(batch.embeddings)


def layer_normed(batch: SlideBatch) -> Tensor:
    """(T, D): each tile's standardised embedding, once more centred and scaled over its own dimensions (He et al. 2022,
    normalised pixels)."""
    return F.layer_norm(batch.targets(), batch.embeddings.shape[1:])


def nearest_clusters(batch: SlideBatch) -> Tensor:
    """(T,) int64: the cluster whose centre is nearest to a tile's standardised embedding."""
    return nearest_centres(batch.targets(), _centres(batch))[0]


def expected_centre(logits: Tensor, batch: SlideBatch) -> Tensor:
    """(M, K) → (M, D): Σ_k softmax_k c_k, the standardised embedding that a prediction of clusters amounts to."""
    centres = _centres(batch)
    return at_least_float32(logits).softmax(dim=1).to(centres.dtype) @ centres


def _centres(batch: SlideBatch) -> Tensor:
    assert batch.centres is not None, "the stage finds clusters for objectives that ask for them"
    return batch.centres


def unchanged(prediction: Tensor, *_: object) -> Tensor:
    """The prediction, which is complete and of what is judged."""
    return prediction


def as_long_as_visible(prediction: Tensor, targets: Tensor, batch: SlideBatch) -> Tensor:
    """Directions (M, D), each made as long as the visible tiles of its slide are on average."""
    lengths = targets[batch.visible].norm(dim=1).split(batch.visible_lengths)
    each = [mean.expand(n) for mean, n in zip([some.mean() for some in lengths], batch.masked_lengths, strict=True)]
    return F.normalize(at_least_float32(prediction), dim=1) * torch.cat(each)[:, None]


SLIDE_TARGETS = {
    "embedding": SlideTarget(
        as_stored, SlideBatch.targets, lambda prediction, batch: (prediction - batch.mean) / batch.std
    ),
    "standardised": SlideTarget(SlideBatch.targets, SlideBatch.targets, unchanged),
    "layer_norm": SlideTarget(layer_normed, layer_normed, unchanged),
    "clusters": SlideTarget(nearest_clusters, SlideBatch.targets, expected_centre),
}

SLIDE_LOSSES = {
    "mean_squared": TileLoss(lambda given, wanted: (given - wanted).square().mean(dim=1), unchanged),
    "smooth_l1": TileLoss(
        lambda given, wanted: F.smooth_l1_loss(given, wanted, reduction="none").mean(dim=1), unchanged
    ),
    "cosine": TileLoss(lambda given, wanted: 1 - F.cosine_similarity(given, wanted, dim=1), as_long_as_visible),
    "cross_entropy": TileLoss(lambda given, wanted: F.cross_entropy(given, wanted, reduction="none"), unchanged),
}


def check_target_and_loss(target: str, loss: str) -> None:
    """Raise ValueError for a loss that isn't one of that target."""
    if (target == "clusters") != (loss == "cross_entropy"):
        raise ValueError(
            "clusters are learned by cross_entropy, and everything else by mean_squared, smooth_l1 or cosine"
        )
