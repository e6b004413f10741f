"""SIGReg (LeJEPA, Balestriero & LeCun 2025): embeddings are held to an isotropic Gaussian, by tests of Epps and Pulley
on random lines. By Cramér and Wold, a distribution is that Gaussian when it is on every line.

Its knots, their range and their weights are those of the authors' published code.
"""

import numpy as np
import torch
from torch import Tensor

from data.fused import fusible
from data.keyed import rng
from data.on_device import on_device
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.precision import at_least_float32

KNOTS, LAST_KNOT = 17, 3.0  # where characteristic functions are compared: from 0 on, as they are symmetric


def drawn_directions(width: int, slices: int, moment: Moment, like: Tensor) -> Tensor:
    """Unit columns ``(width, slices)``, uniform on the sphere, by (seed, step): the same on all ranks and for all
    micro-batches. On the device, and of the type, of ``like``."""
    drawn = rng(moment.seed, "directions", moment.step).standard_normal((width, slices), np.float32)
    return on_device(drawn / np.linalg.norm(drawn, axis=0), like.device).to(like.dtype)


@fusible
def characteristic_means(z: Tensor, directions: Tensor, knots: int = KNOTS, last: float = LAST_KNOT) -> Tensor:
    """Embeddings ``(views, samples, width)`` → ``(2, views, slices, knots)``: the means over samples of ``cos(t x)`` and
    ``sin(t x)``, x the embeddings on each of the ``directions`` ``(width, slices)``. Means of equal parts add up."""
    angles = (z @ directions).unsqueeze(-1) * torch.linspace(0.0, last, knots, dtype=z.dtype, device=z.device)
    return torch.stack([angles.cos().mean(1), angles.sin().mean(1)])


@fusible
def epps_pulley(means: Tensor, samples: Tensor | float, last: float = LAST_KNOT) -> Tensor:
    """The statistic ``(views, slices)`` of `characteristic_means` of so many samples,

        N · Σ_k w_k [ (mean cos(t_k x) − exp(−t_k²/2))² + (mean sin(t_k x))² ],

    w the trapezoid rule over [−last, last] times exp(−t²/2). Of Gaussian samples its mean is about 1.05; where all
    samples are 0 it is 0.40 N.
    """
    t = torch.linspace(0.0, last, means.shape[-1], dtype=means.dtype, device=means.device)
    gauss, step = torch.exp(-t.square() / 2), last / (means.shape[-1] - 1)
    ends = torch.minimum(t / step, (last - t) / step).clamp(max=1) + 1  # 1 at both, 2 between
    cosines, sines = means.unbind()
    return samples * ((cosines - gauss).square() + sines.square()) @ (step * ends.round() * gauss)


def sigreg_of_groups(x: Tensor, group: int, moment: Moment, slices: int = 256) -> Tensor:
    """SIGReg of features ``(N, D)``, in groups of ``group`` consecutive rows, as the other spreads act: a scalar."""
    z = at_least_float32(x).unflatten(0, (-1, group))
    directions = drawn_directions(z.shape[-1], slices, moment, z)
    return epps_pulley(characteristic_means(z, directions), group).mean()
