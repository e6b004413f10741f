"""Keeping features apart: KoLeo, kernel density regularisers, and SIGReg. All act on groups of a set size in stream
order."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from data.fused import fusible
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.precision import at_least_float32
from pretrain.objectives.losses.sigreg import sigreg_of_groups


@fusible
def koleo(x: Tensor, group: int, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko: ``− mean log |x_i − nearest neighbour of x_i|`` on unit vectors (Sablayrolles et al. 2019).

    ``x``: ``(N, D)``; neighbours are looked for inside each group of ``group`` consecutive rows, as DINOv2 looks for
    them on one GPU. float32 throughout, and the distance as ``sqrt(|d|² + tiny)``: duplicate tiles, routine in
    pathology, give a finite value and a zero gradient where a plain norm gives NaN.
    """
    x = F.normalize(at_least_float32(x), dim=-1, eps=eps).unflatten(0, (-1, group))  # (groups, group, D)
    with torch.no_grad():
        similarity = x @ x.transpose(1, 2)
        similarity.diagonal(dim1=1, dim2=2).fill_(-2.0)
        nearest = similarity.argmax(dim=2)  # (groups, group)
    neighbour = torch.gather(x, 1, nearest.unsqueeze(-1).expand_as(x))
    # The reference adds eps to every coordinate of the difference; under the root it doesn't give duplicates a
    # gradient.
    distance = ((x - neighbour).square().sum(-1) + eps**2).sqrt()
    return -torch.log(distance + eps).mean()


@fusible
def kde(x: Tensor, group: int, concentration: float = 5.0) -> Tensor:
    """``mean_i log mean_{j≠i} exp(κ x_i·x_j)`` on unit vectors: low when features are spread over the sphere.

    The log of a von Mises-Fisher kernel density at each sample, estimated from the *other* samples of its group
    (Wang & Isola 2020's uniformity with a vMF kernel; Virchow2 uses it in place of KoLeo with κ = 5). Minimising it
    spreads features; it is smooth, so identical tiles are no special case.
    """
    x = F.normalize(at_least_float32(x), dim=-1, eps=1e-8).unflatten(0, (-1, group))
    similarity = concentration * (x @ x.transpose(1, 2))
    own = torch.eye(group, dtype=torch.bool, device=x.device)
    density = torch.logsumexp(similarity.masked_fill(own, -torch.inf), dim=2)
    return (density - torch.log(torch.tensor(group - 1.0))).mean()


@fusible
def kde_as_published(x: Tensor, group: int, concentration: float = 5.0) -> Tensor:
    """``− mean_i log Σ_j exp(κ x_i·x_j)``, self-pairs included: the term that OpenMidnight minimises.

    Its sign is the opposite of `kde`'s, so minimising it pulls features together; it is here to reproduce that run
    only.
    """
    x = F.normalize(at_least_float32(x), dim=-1, eps=1e-8).unflatten(0, (-1, group))
    return -torch.logsumexp(concentration * (x @ x.transpose(1, 2)), dim=2).mean()


SPREADS: Mapping[str, Callable[[Tensor, int, Moment, float], Tensor]] = {
    "koleo": lambda x, group, *_: koleo(x, group),
    "kde": lambda x, group, _, concentration: kde(x, group, concentration),
    "kde_as_published": lambda x, group, _, concentration: kde_as_published(x, group, concentration),
    "sigreg": lambda x, group, moment, _: sigreg_of_groups(x, group, moment),
}
"""The regularisers by name, each ``(features (N, D), group, moment, κ of the kernels that have one) → scalar``."""
