"""Self-attention over a packed sequence of crops.

Crops of several sizes lie one behind the other in a single ``(T, width)`` tensor, so that norms and linears run once
over everything. Attention alone must know where a crop ends. A *backend* is a function
``(qkv (T, 3 * width), shapes, heads) → parts of (T, width)`` that attends inside each crop:

    sdpa      once per crop size, each a plain batch for torch's scaled_dot_product_attention; on a CPU, for crops of few
              tokens, as matrix products, which are many times faster there (most of all in bfloat16, backward)
    xformers  once over the whole sequence, under a block-diagonal mask; needs the package and a CUDA device
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.operations import Operations, attention_products, total_operations

Shape = tuple[int, int]
"""``(crops, tokens per crop)`` of one crop size inside a packed sequence."""

FEW_TOKENS = 512
"""Up to here a crop's attention matrix is small, and on a CPU plain products beat the fused kernel."""

Backend = Callable[[Tensor, Sequence[Shape], int], Sequence[Tensor]]

Kernel = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]
"""Attention over sequences of the given lengths, one behind the other: q, k, v ``(1, T, heads, d)`` → ``(1, T, heads,
d)``."""


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError for a width that the heads don't divide."""
    if width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}")


def attend(qkv: Tensor, shapes: Sequence[Shape], heads: int, fused: bool = False) -> list[Tensor]:
    """Softmax attention inside each crop: ``(T, 3 * width)`` → per shape ``(crops * tokens, width)``.

    ``softmax(q kᵀ / √d) v`` per head: the one formula, by the kernel that is fast for the device and length, or by the
    ``fused`` one whatever these are.
    """
    width = qkv.shape[-1] // 3
    outputs = []
    for part, (crops, tokens) in zip(qkv.split([crops * tokens for crops, tokens in shapes]), shapes, strict=True):
        q, k, v = part.view(crops, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind()
        few = qkv.device.type == "cpu" and tokens <= FEW_TOKENS and not fused
        out = (
            _products(q, k, v) if few else F.scaled_dot_product_attention(q, k, v)
        )  # (crops, heads, tokens, width / heads)
        outputs.append(out.transpose(1, 2).reshape(crops * tokens, width))
    return outputs


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q kᵀ / √d) v`` on ``(crops, heads, tokens, d)``."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


def attend_block_diagonal(qkv: Tensor, shapes: Sequence[Shape], heads: int, kernel: Kernel) -> list[Tensor]:
    """What `attend` computes, in one part, by one call of a kernel for sequences of many lengths."""
    width = qkv.shape[-1] // 3
    q, k, v = qkv.view(1, len(qkv), 3, heads, width // heads).unbind(2)
    return [kernel(q, k, v, crop_lengths(shapes)).reshape(len(qkv), width)]


def crop_lengths(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """The tokens of every single crop, in the order of the packed sequence."""
    return tuple(tokens for crops, tokens in shapes for _ in range(crops))


def backend(name: str) -> Backend:
    """The backend of that name. Raises ValueError for an unknown one, and for one that can't run on this machine."""
    if name == "sdpa":
        return attend
    if name == "xformers":
        kernel = _xformers_kernel()
        return lambda qkv, shapes, heads: attend_block_diagonal(qkv, shapes, heads, kernel)
    raise ValueError(f"attention is 'sdpa' or 'xformers', not {name!r}")


@lru_cache
def _xformers_kernel() -> Kernel:
    """xformers' memory-efficient attention. Its masks are made once for each list of lengths: they copy it to the
    GPU."""
    if not torch.cuda.is_available():
        raise ValueError(
            "attention=xformers needs a CUDA device and there is none here: use attention=sdpa, which computes the same"
        )
    try:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask
    except ImportError as error:
        raise ValueError(
            f"attention=xformers needs the package xformers ({error}): pip install 'slidewright[xformers]', or use"
            " attention=sdpa, which computes the same"
        ) from error

    @lru_cache(maxsize=16)
    def mask(lengths: tuple[int, ...], device: torch.device) -> Any:
        return BlockDiagonalMask.from_seqlens(list(lengths), device=device)

    return lambda q, k, v, lengths: memory_efficient_attention(q, k, v, attn_bias=mask(lengths, q.device))


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names (``qkv``, ``proj``)."""

    def __init__(self, width: int, heads: int, attend: Backend = attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shapes: Sequence[Shape], rows: Tensor | None = None) -> Tensor:
        """``(T, width)`` → ``(T, width)``, attending inside each crop of ``shapes``; or the result's ``rows`` ``(R,)``
        alone."""
        parts = self.attend(self.qkv(x), shapes, self.heads)
        if rows is not None:
            return self.proj(torch.cat(list(parts)).index_select(0, rows))
        # Each part by itself: the kernels keep their results for the backward, and a joined copy would be kept too.
        return torch.cat([self.proj(part) for part in parts])

    def products(self, shapes: Sequence[Shape]) -> Operations:
        """Operations between the tokens of crops of ``shapes``."""
        weight = self.proj.weight
        plain = self.attend is attend and weight.device.type == "cpu"
        return total_operations(
            attention_products(crops * tokens**2, weight.shape[0], fused=not (plain and tokens <= FEW_TOKENS))
            for crops, tokens in shapes
        )
