"""Figures of what a network has learned, which are looked at now and then: do features spread, and does the teacher use
its prototypes?

A look takes the step's own tiles, so it is a function of (seed, step) like everything else, on any number of processes,
and it costs a pass or two of the encoder without gradients. `pretrain.run.alarms` says in words what its figures mean.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.objectives.interface import BACKBONE, Objective
from pretrain.objectives.tile_batch import TileBatch
from pretrain.run.across_ranks import gathered, total

FEWEST_SAMPLES = 4  # whose spread is told: one has none, and what two or three share looks like collapse
MOST_FEATURES = 1024  # a singular value decomposition of more would take seconds


def watched_encoder(objective: Objective) -> nn.Module:
    """The encoder that a run is for: the teacher's where there is one, as in an export."""
    return objective.frozen().get(f"teacher.{BACKBONE}") or objective.trained()[BACKBONE]


@torch.no_grad()
def class_tokens(encoder: nn.Module, images: Tensor) -> Tensor:
    """Normalised images ``(n, 3, S, S)`` → class tokens after the last norm ``(n, width)``, float32."""
    (tokens,) = encoder([images], wanted=[None])
    return tokens.cls.float()


def features_of(encoder: nn.Module, parts: Sequence[TileBatch]) -> Tensor:
    """Features ``(n, width)`` of the global crops of all ranks' micro-batches, view after view, at most
    `MOST_FEATURES`.

    Every rank calls it with its own parts; all get the same, in the order of the global batch.
    """
    views = parts[0].crops[0][1]
    own = [class_tokens(encoder, part.crops[0][0]).unflatten(0, (views, -1)) for part in parts]
    everywhere = gathered(torch.cat(own, dim=1))  # (ranks, views, tiles, width)
    return everywhere.transpose(0, 1).flatten(0, 2)[:MOST_FEATURES]


def spread(features: Tensor) -> dict[str, float]:
    """How far apart features ``(n, width)`` lie; nothing of fewer than `FEWEST_SAMPLES`.

    ``rankme``: the number of directions in use, 1 in collapse, at most min(n, width). ``feature_cosine``: mean cosine
    of two different samples, 1 in collapse. ``feature_std``: standard deviation of the unit-length features times
    √width, 0 in collapse and near 1 where they are spread over the sphere.
    """
    if len(features) < FEWEST_SAMPLES:
        return {}
    x = features.detach().cpu().double()
    unit = F.normalize(x, dim=1)
    n, width = unit.shape
    return {
        "rankme": rankme(x.numpy()),
        # Σ_ij u_i·u_j = |Σ u_i|², of which the n pairs of a sample with itself are taken off.
        "feature_cosine": ((unit.sum(0).square().sum() - n) / (n * (n - 1))).item(),
        "feature_std": (unit.std(0, correction=0).mean() * math.sqrt(width)).item(),
    }


def spread_of_slides(vectors: Tensor) -> dict[str, float]:
    """`spread` of slides' vectors ``(n, width)``, or ``(n, views, width)``, its ``rankme`` as the record calls it there:
    ``effective_rank``, at most the number of vectors. Nothing of fewer slides than `FEWEST_SAMPLES`, however many views
    there are of each."""
    if len(vectors) < FEWEST_SAMPLES:
        return {}
    found = spread(vectors.flatten(0, -2))
    return {"effective_rank": found.pop("rankme")} | found


def rankme(features: np.ndarray, epsilon: float = 1e-7) -> float:
    """RankMe, a smooth count of the directions that features (n, width) use (Garrido 2023, equations 1 and 2).

    exp(−Σ pₖ log pₖ) with pₖ = σₖ / ‖σ‖₁ + ε, over the singular values σ of the features as they are, not centred.
    Between 1 (all features on one line: collapse) and min(n, width); NaN where one isn't finite.
    """
    if not np.isfinite(features).all():
        return math.nan
    singular = np.linalg.svd(np.asarray(features, dtype=np.float64), compute_uv=False)
    p = singular / max(singular.sum(), np.finfo(np.float64).tiny) + epsilon
    return float(np.exp(-np.sum(p * np.log(p))))


@torch.no_grad()
def assignment_figures(targets: Iterable[Tensor], kind: str) -> dict[str, float]:
    """How prototypes are used by the targets of all ranks together; ``targets`` are probabilities ``(n, K)``, in parts.

    ``teacher_entropy``: mean −Σ p log p of a target, nats; 0: one prototype each, log K: any. ``prototype_perplexity``:
    exp of the entropy of the mean target, the number of prototypes in use. ``prototype_use``: prototypes that are the
    first choice of a target, out of min(n, K) that could be. ``teacher_information``: entropy of the mean target − mean
    entropy, nats: what a target tells about its tile; 0 in every collapse.
    """
    entropy, rows, mass, first = None, 0, None, None
    for p in targets:
        entropy = torch.special.entr(p).sum() + (0.0 if entropy is None else entropy)
        mass = p.sum(0) + (0.0 if mass is None else mass)
        first = torch.bincount(p.argmax(1), minlength=p.shape[1]) + (0 if first is None else first)
        rows += len(p)
    assert entropy is not None and mass is not None and first is not None
    n = total(torch.tensor(float(rows), device=mass.device)).clamp(min=1.0)
    mean = total(mass) / n
    of_mean, of_each = torch.special.entr(mean).sum(), total(entropy) / n
    use = (total(first) > 0).sum() / n.clamp(max=len(mean))
    names = ("teacher_entropy", "prototype_perplexity", "prototype_use", "teacher_information")
    values = torch.stack([of_each, of_mean.exp(), use, of_mean - of_each]).tolist()
    return {f"{name}/{kind}": value for name, value in zip(names, values, strict=True)}
