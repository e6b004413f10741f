"""From the teacher's prototype scores to targets that use all prototypes: a moving centre, or Sinkhorn-Knopp."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.fused import fusible
from pretrain.objectives.losses.precision import at_least_float32, wide
from pretrain.run.across_ranks import log_total_exp, total

ITERATIONS = 3  # of Sinkhorn-Knopp


@torch.no_grad()
@fusible
def centred_softmax(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """``softmax((logits − centre) / temperature)``: ``(N, K)`` probabilities in float32 (Caron et al. 2021, §3.1)."""
    return F.softmax(_sharpened(logits, centre / temperature, temperature), dim=-1)


def _sharpened(logits: Tensor, less: Tensor | None, temperature: float) -> Tensor:
    """``logits / temperature − less`` of ``(N, K)``, ``less`` ``(1, K)`` or nothing, in `wide` numbers and one reading."""
    start = logits.new_zeros(1, 1) if less is None else -less
    return torch.add(start.to(wide(logits.dtype)), logits, alpha=1 / temperature)


@torch.no_grad()
def moved_centre(centre: Tensor, sums: Tensor, rows: int, momentum: float = 0.9) -> Tensor:
    """``momentum · centre + (1 − momentum) · mean(logits)``, ``(1, K)``, the mean over the samples of all ranks.

    ``sums`` ``(1, K)`` is the sum of this rank's logits in the step, ``rows`` their number.
    """
    count = total(torch.full((), float(rows), device=sums.device)).clamp(min=1.0)
    return centre * momentum + total(sums) / count * (1 - momentum)


@torch.no_grad()
def sinkhorn_centre(scores: Callable[[], Iterable[Tensor]], temperature: float, iterations: int = ITERATIONS) -> Tensor:
    """The centre ``(1, K)`` with which `centred_softmax` is Sinkhorn-Knopp's assignment over all ranks' samples.

    Starting from ``Q = exp(logits / temperature)``, each iteration divides the columns (prototypes) by their sums over
    the samples, then the rows (samples) by their sums over prototypes (Caron et al. 2020, SwAV, §3.1). Normalising Q as
    a whole and the constants 1/K and 1/N in the reference cancel, so with L = logits / temperature all there is to it
    is

        v ← log Σ_samples exp(L − u),   u ← log Σ_prototypes exp(L − v),   Q = exp(L − u − v) = softmax(L − v)

    and v alone is kept. ``scores()`` gives the logits, ``(n, K)`` a micro-batch, anew for each iteration: a sum over
    samples doesn't need them all at once. In the log domain nothing overflows: the reference is infinite at a logit of
    7 with temperature 0.07.
    """
    v: Tensor | None = None
    for _ in range(iterations):
        column: Tensor | None = None
        for logits in scores():
            part = (
                _column_sums(logits, v, temperature)
                if len(logits)
                # A micro-batch or rank with no sample of its own contributes exp(−∞) = 0.
                else at_least_float32(logits).new_full((1, logits.shape[1]), -math.inf)
            )
            column = part if column is None else torch.logaddexp(column, part)
        assert column is not None
        v = log_total_exp(column)
    assert v is not None
    return v * temperature


@fusible
def _column_sums(logits: Tensor, v: Tensor | None, temperature: float) -> Tensor:
    """``log Σ_samples exp(L − u)`` ``(1, K)``, with u of the ``v`` before; no ``v`` yet: u = 0."""
    if v is None:
        return torch.logsumexp(_sharpened(logits, v, temperature), dim=0, keepdim=True)
    # L − u = log softmax(L − v) + v, and v is the same for all samples.
    return v + torch.logsumexp(F.log_softmax(_sharpened(logits, v, temperature), dim=1), dim=0, keepdim=True)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = ITERATIONS) -> Tensor:
    """Assignments of ``(N, K)`` logits in which the prototypes are used equally often over all ranks' samples:
    `sinkhorn_centre`."""
    return centred_softmax(logits, sinkhorn_centre(lambda: [logits], temperature, iterations), temperature)
