"""Faster attention kernels for CUDA, by name, behind the interface of `models.attention_statistics`.

Each is a pair of functions: a forward that hands out its log-sum-exp, and a backward that takes any. The packages'
public functions drop the log-sum-exp's gradient without a word, which is why their inner forward and backward are
called.
"""

from functools import lru_cache

import torch
from torch import Tensor

from models.attention_statistics import (
    SDPA,
    Batched,
    StatisticsKernel,
    VariableLength,
    flash,
    flash_backward,
)

ATTENTION_KERNELS = ("sdpa", "varlen", "flash_attn", "xformers")


def kernel(name: str) -> StatisticsKernel:
    """The kernel of that name. Raises ValueError for an unknown one, and for one that can't run on this machine."""
    if name == "sdpa":
        return SDPA
    if name not in ATTENTION_KERNELS:
        raise ValueError(f"attention is {', '.join(ATTENTION_KERNELS[:-1])} or {ATTENTION_KERNELS[-1]}, not {name!r}")
    if not torch.cuda.is_available():
        raise ValueError(
            f"attention={name} needs a CUDA device and there is none here: use attention=sdpa, which computes the same"
        )
    return {"varlen": _varlen, "flash_attn": _flash_attn, "xformers": _xformers}[name]()


@lru_cache
def _varlen() -> StatisticsKernel:
    """torch's FlashAttention, and an error for numbers that it doesn't take."""

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        _check_low_precision("varlen", q)
        return flash(q, k, v, starts, longest)

    return VariableLength(attend, flash_backward)


@lru_cache
def _flash_attn() -> StatisticsKernel:
    """The package flash-attn, from version 2.7 on."""
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward
    except ImportError as error:
        raise ValueError(_lacks("flash_attn", "flash-attn", error)) from error

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        _check_low_precision("flash_attn", q)
        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, starts, starts, longest, longest, dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=False
        )
        return out, lse

    def attend_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, longest: int
    ) -> tuple[Tensor, ...]:
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _flash_attn_varlen_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            starts,
            starts,
            longest,
            longest,
            dropout_p=0.0,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=False,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        return dq, dk, dv

    return VariableLength(attend, attend_backward)


@lru_cache
def _xformers() -> StatisticsKernel:
    """The package xformers, runs of one length at a time: its statistics of many lengths have changed shape over
    versions."""
    try:
        from xformers.ops.fmha import (
            memory_efficient_attention_backward,
            memory_efficient_attention_forward_requires_grad,
        )
    except ImportError as error:
        raise ValueError(_lacks("xformers", "'slidewright[xformers]'", error)) from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = memory_efficient_attention_forward_requires_grad(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2), lse[..., : q.shape[2]]

    def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        return tuple(
            x.transpose(1, 2) for x in memory_efficient_attention_backward(grad, out, lse.contiguous(), q, k, v)
        )

    return Batched(attend, attend_backward)


def _check_low_precision(name: str, q: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention={name} computes in float16 or bfloat16, and this model is in"
            f" {str(q.dtype).removeprefix('torch.')}: use attention=sdpa, or set trainer.precision=bf16"
        )


def _lacks(name: str, package: str, error: ImportError) -> str:
    return (
        f"attention={name} needs the package {name} ({error}): pip install {package}, "
        "or use attention=sdpa, which computes the same"
    )
