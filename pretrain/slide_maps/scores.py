"""A score for every tile: how much a slide's vector looked at it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.embeddings.store import SlideEmbeddings
from data.fault import Fault
from data.npz_files import SPOILT
from models.attention_rollout import rollout
from pretrain.embedding.poolings import pooled_vectors
from pretrain.embedding.slides import on_the_device
from pretrain.embedding.tile_clusters import TileClusters
from pretrain.encoders.slide_encoders import SlideEncoder

TileScores = Callable[
    [SlideEncoder, Sequence[SlideEmbeddings], str, TileClusters | None, np.ndarray | None], list[np.ndarray]
]
"""Of an encoder, some slides, the pooling whose vector is asked about, clusters where it needs them, and a direction
among such vectors: a score per tile (n,) float32 of each slide."""


def by_rollout(
    encoder: SlideEncoder,
    batch: Sequence[SlideEmbeddings],
    pooling: str,
    clusters: TileClusters | None,
    direction: np.ndarray | None,
) -> list[np.ndarray]:
    """Attention rollout: of the class token where the pooling is of that, or else of the mean of the tiles. Times the
    number of tiles: 1 is what each would have of an even share. Raises Fault for a network whose attention isn't
    known."""
    x, cells, lengths = on_the_device(batch, encoder.device)
    try:
        found = rollout(encoder.network, x, cells, lengths, pooling.startswith("cls"))
    except ValueError as error:
        raise Fault(f"{encoder.name}: {error}; maps=gradient asks nothing of its attention.") from error
    return [some.cpu().numpy() * len(some) for some in found.split(lengths)]


def by_gradient(
    encoder: SlideEncoder,
    batch: Sequence[SlideEmbeddings],
    pooling: str,
    clusters: TileClusters | None,
    direction: np.ndarray | None,
) -> list[np.ndarray]:
    """Gradient × input: ``x_i · ∂s/∂x_i`` of ``s``, the vector's projection on ``direction`` (the weights of a linear
    model: its logit), or on the vector's own: how fast it rises as the tile grows. Activations of all tiles are kept,
    and a slide goes by itself."""
    found = []
    for slide in batch:
        x, cells, lengths = on_the_device([slide], encoder.device)
        x.requires_grad_()
        with torch.enable_grad():
            seen = encoder.network(x, cells, lengths, all_layers=True)
            vector = pooled_vectors(x, lengths, seen, clusters)[pooling][0]
        (gradient,) = torch.autograd.grad(vector, x, towards(vector, direction))
        found.append((gradient * x.detach()).sum(dim=1).float().cpu().numpy())
    return found


def by_sensitivity(
    encoder: SlideEncoder,
    batch: Sequence[SlideEmbeddings],
    pooling: str,
    clusters: TileClusters | None,
    direction: np.ndarray | None,
) -> list[np.ndarray]:
    """The size of gradient × input. Of second moments its sign doesn't say for what a tile speaks: a nest that raises a
    logit by being in one piece lowers it as its tiles grow."""
    return [np.abs(scores) for scores in by_gradient(encoder, batch, pooling, clusters, direction)]


def towards(vector: Tensor, direction: np.ndarray | None) -> Tensor:
    """The direction, or the vector's own at length 1."""
    if direction is not None:
        return torch.from_numpy(direction).to(vector)
    return vector.detach() / vector.detach().norm().clamp(min=torch.finfo(vector.dtype).tiny)


WAYS: dict[str, TileScores] = {"rollout": by_rollout, "gradient": by_gradient, "sensitivity": by_sensitivity}


def read_direction(path: Path, width: int, pooling: str) -> np.ndarray:
    """Weights ``(width,)`` float64 in a .npy file. Raises Fault where they aren't for vectors of this pooling."""
    try:
        found = np.load(path, allow_pickle=False)
        weights = np.asarray(found, np.float64).reshape(-1)
    except (*SPOILT, TypeError, AttributeError) as error:
        raise Fault(f"direction={path} can't be read ({error}): give a linear model's weights, numpy.save.") from error
    if len(weights) != width or not np.isfinite(weights).all():
        raise Fault(
            f"direction={path} has {len(weights)} numbers, and vectors of pooling={pooling} are {width} wide: give the"
            " weights of a linear model on these, all finite."
        )
    return weights
