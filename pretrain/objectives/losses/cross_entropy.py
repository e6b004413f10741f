"""Self-distillation: the student's prototype scores should predict the teacher's assignments."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.fused import fusible
from pretrain.objectives.losses.precision import at_least_float32, wide


@fusible
def dino_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a student view and a teacher view of the same tile.

    ``student``: logits ``(S, B, K)`` of S views; ``teacher``: probabilities ``(V, B, K)`` of V views. Returns

        1 / (S V B) · Σ_s Σ_v Σ_b  − Σ_k teacher[v, b, k] · log softmax(student[s, b] / temperature)[k]

    (Caron et al. 2021, eq. 2, with the mean in place of the sum over pairs), in float32.
    """
    views, batch = student.shape[0], student.shape[1]
    weight = torch.full((batch,), 1 / (views * batch), dtype=wide(student.dtype), device=student.device)
    # Σ_v t·log p = (Σ_v t) · log p: one product per student view instead of one per pair.
    return weighted_cross_entropy(student, at_least_float32(teacher).mean(0), weight, temperature)


def cross_view_entropy(student: Sequence[Tensor], teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """DINO's loss over crossed views: a global view predicts the other global ones, a local view predicts all global
    ones.

    ``student``: logits per crop size ``(views, B, K)``, the V global views first; ``teacher``: probabilities ``(V, B,
    K)``. Returns the shares of global and local views, whose sum is the mean over all V (V − 1) + V · locals pairs
    (Caron et al. 2021, eq. 3).
    """
    views = len(teacher)
    wide_views, *narrow = student
    pairs = [(s, t) for s in range(views) for t in range(views) if s != t]
    terms = len(pairs) + sum(len(part) * views for part in narrow)
    of_globals = teacher.new_zeros(())
    for s, t in pairs:
        of_globals = of_globals + dino_cross_entropy(wide_views[s : s + 1], teacher[t : t + 1], temperature)
    of_locals = teacher.new_zeros(())
    for part in narrow:
        of_locals = of_locals + dino_cross_entropy(part, teacher, temperature) * len(part) * views
    return of_globals / terms, of_locals / terms


@fusible
def masked_cross_entropy(student: Tensor, teacher: Tensor, weight: Tensor, crops: int, temperature: float) -> Tensor:
    """iBOT's loss on masked patches (Zhou et al. 2022, eq. 3).

    ``student``: logits ``(M, K)`` and ``teacher``: probabilities ``(M, K)`` of the M masked patches of ``crops`` crops;
    ``weight``: ``(M,)``, one over the number of masked patches of each patch's crop, so that crops count equally:

        1 / crops · Σ_m weight[m] · (− Σ_k teacher[m, k] · log softmax(student[m] / temperature)[k])
    """
    return weighted_cross_entropy(student, at_least_float32(teacher), weight / crops, temperature)


def weighted_cross_entropy(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """``Σ_m weight[m] · (− Σ_k teacher[m, k] · log softmax(student[m] / temperature)[k])``.

    ``student``: logits ``(…, M, K)``; ``teacher``: probabilities ``(M, K)``, whose sums over K are 1, and ``weight``
    ``(M,)``, neither of which gets a gradient. That of the logits, ``weight · (softmax − teacher) / temperature``, is
    computed with the loss and kept in their own precision: a quarter of what torch would keep of 16-bit logits.
    """
    return _WeightedCrossEntropy.apply(student, teacher, weight, temperature)


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
        one = torch.full((1, 1), temperature, dtype=wide(student.dtype), device=student.device)
        log_p = F.log_softmax(student / one, dim=-1)  # a division that widens, in one reading
        loss = -((teacher * log_p).sum(-1) * weight).sum()
        if ctx.needs_input_grad[0]:
            away = torch.sub(log_p.exp_(), teacher, out=torch.empty_like(student))
            ctx.save_for_backward(away, weight / temperature)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        away, weight = ctx.saved_tensors
        return torch.mul(away, (grad * weight).unsqueeze(-1), out=torch.empty_like(away)), None, None, None
