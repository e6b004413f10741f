"""Dilated attention in the padded formulation that public code uses, written plainly: what the benchmark compares with.

Per branch (w, r): pad the sequence to whole segments of w tokens and every segment to a multiple of r, give each of r
groups of heads the tokens of its offset, attend, scatter outputs and log-sum-exps into dense arrays of all tokens and
heads, cut the padding off. Then merge the branches' dense outputs by softmax weights, constants in the backward, and
leave the rest to autograd. One slide, as public code takes one length a batch. The attention kernel is the project's
own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention_statistics import stock, stock_backward

ABSENT = -1e8


class Kernel(torch.autograd.Function):
    """The project's attention kernel for autograd: (batch, heads, tokens, head_width) → output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = stock(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return stock_backward(grad, *ctx.saved_tensors)


def sparsify(x: Tensor, w: int, r: int) -> Tensor:
    """(N, heads, width) → (segments, ceil(w / r), heads, width): each group of heads at its own offset."""
    n, heads, width = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -n % w)).view(-1, w, heads, width)
    x = F.pad(x, (0, 0, 0, 0, 0, -w % r))
    x = x.view(len(x), -1, r, r, heads // r, width)  # (segments, places, offsets, groups of heads, heads, width)
    return torch.diagonal(x, dim1=2, dim2=3).permute(0, 1, 4, 2, 3).flatten(2, 3)


def densify(x: Tensor, n: int, w: int, r: int, absent: float) -> Tensor:
    """The inverse of `sparsify`: (segments, places, heads, width) → (N, heads, width), ``absent`` where a head has no
    token."""
    segments, places, heads, width = x.shape
    dense = x.new_full((segments, places, r, r, heads // r, width), absent)
    torch.diagonal(dense, dim1=2, dim2=3).copy_(x.unflatten(2, (r, -1)).permute(0, 1, 3, 4, 2))
    return dense.view(segments, places * r, heads, width)[:, :w].reshape(segments * w, heads, width)[:n]


def padded_dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, segment_lengths: Sequence[int], dilated_ratios: Sequence[int]
) -> Tensor:
    """One slide, (N, heads, width) each → (N, heads, width). Every ratio must divide the heads."""
    n = len(q)
    outs, lses = [], []
    for length, r in zip(segment_lengths, dilated_ratios, strict=True):
        w = min(length, n)
        out, lse = Kernel.apply(*(sparsify(x, w, r).transpose(1, 2) for x in (q, k, v)))
        outs.append(densify(out.transpose(1, 2), n, w, r, 0.0))
        lses.append(densify(lse.transpose(1, 2)[..., None], n, w, r, ABSENT))
    with torch.no_grad():
        weights = torch.stack(lses).softmax(dim=0)
    merged = torch.zeros_like(outs[0])
    for out, weight in zip(outs, weights, strict=True):
        merged = merged + out * weight
    return merged
