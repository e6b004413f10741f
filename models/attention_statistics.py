"""Softmax attention that also hands out its log-sum-exp, forward and backward as two plain functions.

Attention over parts of the keys can be merged afterwards when each part's log-sum-exp (LSE) is known, and the gradient
of the merged result is the ordinary attention backward fed with the *merged* output and LSE (see
`models.dilated_attention`). torch's public attention keeps the LSE to itself, so this module calls the stock kernels
beneath it, and is the one place where a faster kernel would be added.

Everywhere: ``q, k, v`` are (batch, heads, tokens, head_width) with any strides as long as the last is 1, the softmax
scale is ``head_width ** -0.5``, nothing is masked, and neither function records an autograd graph.
"""

import torch
from torch import Tensor

BLOCK = 1024  # queries at a time on the plain path: bounds its scores to BLOCK x tokens


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and its statistics: the output, shaped and typed as ``q``, and the LSE (batch, heads, tokens).

    ``out = softmax(s) v`` and ``lse = log Σ_keys exp(s)`` with ``s = q kᵀ / √head_width``. The LSE is float32, or float64
    when ``q`` is.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return _attend_plainly(q, k, v)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q, k, v`` for the gradient ``grad`` of the output, given ``out`` and ``lse`` of any softmax they are part of.

    With ``P = exp(s - lse)``: ``dV = Pᵀ dO``, ``dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))``, ``dQ = dS K / √d``, ``dK = dSᵀ Q / √d``
    (Dao et al. 2022, FlashAttention, algorithm 4). ``P`` need not sum to one over these keys: when ``lse`` and ``out``
    are those of a larger set of keys, the result is this set's exact share of the gradient.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    return _attend_backward_plainly(grad, q, k, v, out, lse)


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` in plain matrix products, a block of queries at a time: any device, any floating type."""
    precise = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for queries in q.split(BLOCK, dim=2):
        scores = (queries @ k.mT).to(precise) * q.shape[-1] ** -0.5
        lse = scores.logsumexp(dim=-1)
        outs.append((scores - lse[..., None]).exp().to(q.dtype) @ v)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _attend_backward_plainly(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` in plain matrix products, a block of queries at a time."""
    precise = lse.dtype
    scale = q.shape[-1] ** -0.5
    dk, dv = torch.zeros_like(k, dtype=precise), torch.zeros_like(v, dtype=precise)
    dqs = []
    blocks = zip(q.split(BLOCK, 2), grad.split(BLOCK, 2), out.split(BLOCK, 2), lse.split(BLOCK, 2), strict=True)
    for queries, gradient, output, statistic in blocks:
        p = ((queries @ k.mT).to(precise) * scale - statistic[..., None]).exp()
        dv += p.mT @ gradient.to(precise)
        shared = (gradient.to(precise) * output.to(precise)).sum(dim=-1, keepdim=True)
        ds = p * ((gradient @ v.mT).to(precise) - shared) * scale
        dk += ds.mT @ queries.to(precise)
        dqs.append((ds @ k.to(precise)).to(q.dtype))
    return torch.cat(dqs, dim=2), dk.to(k.dtype), dv.to(v.dtype)
