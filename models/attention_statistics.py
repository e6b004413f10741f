"""Softmax attention over runs of tokens that also hands out its log-sum-exp, forward and backward as two plain
functions.

Attention over parts of the keys can be merged afterwards when each part's log-sum-exp (LSE) is known, and the gradient
of the merged result is the ordinary attention backward fed with the *merged* output and LSE (see
`models.dilated_attention`). Public attention functions keep the LSE to themselves or drop its gradient, so the stock
kernels beneath them are called here.

Runs lie one behind another: ``q, k, v`` are (rows, heads, head_width), and ``shapes`` says which rows belong together,
as ``(runs, tokens in each)`` in order. The softmax scale is ``head_width ** -0.5``, nothing is masked, and no autograd
graph is recorded. A `Kernel` is found by name:

    sdpa        torch's stock kernels, which run everywhere: on CUDA in float16 or bfloat16 FlashAttention, one call for
                runs of all lengths; else a call for each run length
    varlen      that FlashAttention, or an error where it doesn't run
    flash_attn  the same of the package flash-attn; CUDA, float16 or bfloat16
    xformers    the package xformers, a call for each run length; CUDA
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.uploaded import uploaded

EqualRuns = tuple[int, int]
"""``(runs, tokens in each)``."""

QUERIES_A_BLOCK = 1024  # queries at a time on the plain path: bounds its scores to so many x tokens
ALIGNED = 32  # the memory-efficient kernel's LSE comes and goes padded to a multiple of this


class StatisticsKernel(Protocol):
    """Attention inside runs, and its share of the gradient of a softmax that may be larger."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shapes: Sequence[EqualRuns]) -> tuple[Tensor, Tensor]:
        """``out = softmax(s) v``, shaped and typed as ``q``, and ``lse = log Σ_keys exp(s)``, (rows, heads), at least
        float32."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shapes: Sequence[EqualRuns]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``q, k, v`` for the gradient ``grad`` of the output, given ``out`` and ``lse`` of any softmax
        they are part of.

        With ``P = exp(s - lse)``: ``dV = Pᵀ dO``, ``dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))``, ``dQ = dS K / √d``, ``dK = dSᵀ
        Q / √d`` (Dao et al. 2022, FlashAttention, algorithm 4). ``P`` need not sum to one over these keys: when ``lse``
        and ``out`` are those of a larger set of keys, the result is this set's exact share of the gradient.
        """


class Batched:
    """A kernel that takes runs of one length as a batch; every length is a call.

    ``attend``: q, k, v (runs, heads, length, head_width) → the output and the LSE (runs, heads, length).
    ``attend_backward``: grad, q, k, v, out, lse → dq, dk, dv. Any strides, as long as the last is 1.
    """

    def __init__(self, attend: Callable[..., tuple[Tensor, ...]], attend_backward: Callable[..., tuple[Tensor, ...]]):
        self.attend, self.attend_backward = attend, attend_backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shapes: Sequence[EqualRuns]) -> tuple[Tensor, Tensor]:
        out, lse = self._each(self.attend, (q, k, v), shapes)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shapes: Sequence[EqualRuns]
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = self._each(self.attend_backward, (grad, q, k, v, out, lse), shapes)
        return dq, dk, dv

    @staticmethod
    def _each(
        function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], shapes: Sequence[EqualRuns]
    ) -> list[Tensor]:
        sizes = [runs * length for runs, length in shapes]
        whole: list[Tensor] = []
        for number, (shape, *parts) in enumerate(zip(shapes, *(x.split(sizes) for x in tensors), strict=True)):
            results = [
                x.transpose(1, 2).flatten(0, 1)
                for x in function(*(p.unflatten(0, shape).transpose(1, 2) for p in parts))
            ]
            if len(shapes) == 1:
                return results
            # Filled as results come: joined at the end, all of them would be there twice.
            whole = whole or [x.new_empty(sum(sizes), *x.shape[1:]) for x in results]
            for rows, result in zip(whole, results, strict=True):
                rows.split(sizes)[number].copy_(result)
        return whole


class VariableLength:
    """A kernel that takes runs of all lengths in one call, with the rows at which they begin.

    ``attend``: q, k, v (rows, heads, head_width), starts (runs + 1,) int32, longest → the output and the LSE (heads,
    rows). ``attend_backward``: grad, q, k, v, out, lse (heads, rows), starts, longest → dq, dk, dv. Everything
    contiguous.
    """

    def __init__(
        self, attend: Callable[..., tuple[Tensor, Tensor]], attend_backward: Callable[..., tuple[Tensor, ...]]
    ):
        self.attend, self.attend_backward = attend, attend_backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shapes: Sequence[EqualRuns]) -> tuple[Tensor, Tensor]:
        out, lse = self.attend(q.contiguous(), k.contiguous(), v.contiguous(), *run_starts(tuple(shapes), q.device))
        return out, lse.mT

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shapes: Sequence[EqualRuns]
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (x.contiguous() for x in (grad, q, k, v, out, lse.mT))
        dq, dk, dv = self.attend_backward(*tensors, *run_starts(tuple(shapes), q.device))
        return dq, dk, dv


@lru_cache(maxsize=64)
def run_starts(shapes: tuple[EqualRuns, ...], device: torch.device) -> tuple[Tensor, int]:
    """The rows at which runs begin, (runs + 1,) int32 with the total last, and the longest run. Cached: every layer
    asks again."""
    counts, lengths = np.array(shapes, dtype=np.int32).T
    starts = np.concatenate([[0], lengths.repeat(counts).cumsum()])
    return uploaded(torch.from_numpy(starts.astype(np.int32)), device), int(lengths.max())


def flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """torch's FlashAttention for runs of many lengths, beneath ``torch.nn.attention.varlen``, for `VariableLength`:
    CUDA, 16-bit numbers."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, False, False, scale=q.shape[-1] ** -0.5
    )
    return out, lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, longest: int
) -> tuple[Tensor, ...]:
    """The backward of `flash`."""
    no_draws = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        starts,
        starts,
        longest,
        longest,
        0.0,
        False,
        no_draws,
        unused,
        scale=q.shape[-1] ** -0.5,
    )


def stock(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own attention with statistics, for `Batched`: flash on CPUs, memory-efficient on CUDA, otherwise plain
    products."""
    aten = torch.ops.aten
    match _stock_kernel(q):
        case "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        case "efficient":
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
            return out, lse[..., : q.shape[2]]
    return matrix_products(q, k, v)


def stock_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """The backward of `stock`."""
    aten, kernel = torch.ops.aten, _stock_kernel(q)
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    if kernel == "plain":
        return plain_backward(grad, q, k, v, out, lse)
    padded = F.pad(lse, (0, -q.shape[2] % ALIGNED), value=torch.inf).contiguous()  # padded by nothing it is as it was
    seed, offset = torch.zeros(2, dtype=torch.int64, device=q.device).unbind()
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, padded, seed, offset, 0.0, [True, True, True, False]
    )[:3]


def _stock_kernel(q: Tensor) -> str:
    """Which kernel takes ``q``, a run length at a time: that of CUDA wants a head of whole 16-byte words."""
    if q.device.type == "cpu":
        return "cpu"
    return "plain" if q.device.type != "cuda" or q.shape[-1] % 8 or q.dtype == torch.float64 else "efficient"


def takes_flash(q: Tensor) -> bool:
    """Whether CUDA's FlashAttention takes ``q``: 16-bit numbers, and a head of whole 16-byte words, up to 256 wide; on a
    GPU since Ampere."""
    low = q.dtype in (torch.float16, torch.bfloat16)
    fits = q.device.type == "cuda" and low and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and has_flash(q.device)


@cache
def has_flash(device: torch.device) -> bool:
    """Whether a GPU has what FlashAttention is written for; one that isn't there (fake tensors) has."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def matrix_products(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`stock` in plain matrix products, a block of queries at a time: any device, any floating type."""
    precise = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for queries in q.split(QUERIES_A_BLOCK, dim=2):
        scores = (queries @ k.mT).to(precise) * q.shape[-1] ** -0.5
        lse = scores.logsumexp(dim=-1)
        outs.append((scores - lse[..., None]).exp().to(q.dtype) @ v)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`stock_backward` in plain matrix products, a block of queries at a time."""
    precise = lse.dtype
    scale = q.shape[-1] ** -0.5
    dk, dv = torch.zeros_like(k, dtype=precise), torch.zeros_like(v, dtype=precise)
    dqs = []
    blocks = zip(
        q.split(QUERIES_A_BLOCK, 2),
        grad.split(QUERIES_A_BLOCK, 2),
        out.split(QUERIES_A_BLOCK, 2),
        lse.split(QUERIES_A_BLOCK, 2),
        strict=True,
    )
    for queries, gradient, output, statistic in blocks:
        p = ((queries @ k.mT).to(precise) * scale - statistic[..., None]).exp()
        dv += p.mT @ gradient.to(precise)
        shared = (gradient.to(precise) * output.to(precise)).sum(dim=-1, keepdim=True)
        ds = p * ((gradient @ v.mT).to(precise) - shared) * scale
        dk += ds.mT @ queries.to(precise)
        dqs.append((ds @ k.to(precise)).to(q.dtype))
    return torch.cat(dqs, dim=2), dk.to(k.dtype), dv.to(v.dtype)


class TorchKernels:
    """torch's own kernels: `flash` where it runs, and else `stock`."""

    def __init__(self) -> None:
        self.all_lengths = VariableLength(flash, flash_backward)
        self.each_length = Batched(stock, stock_backward)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shapes: Sequence[EqualRuns]) -> tuple[Tensor, Tensor]:
        return self._for(q).forward(q, k, v, shapes)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shapes: Sequence[EqualRuns]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._for(q).backward(grad, q, k, v, out, lse, shapes)

    def _for(self, q: Tensor) -> StatisticsKernel:
        return self.all_lengths if takes_flash(q) else self.each_length


SDPA = TorchKernels()
