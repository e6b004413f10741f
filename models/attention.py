"""Self-attention over a packed sequence of crops.

Crops of several sizes lie one behind the other in a single ``(T, width)`` tensor, so that norms and linears run once
over everything. Attention alone must know where a crop ends. A *backend* is a function
``(qkv (T, 3 * width), shapes, heads) → parts of (T, width)`` that attends inside each crop:

    sdpa      once per crop size, each a plain batch for torch's scaled_dot_product_attention; on a CPU, for crops of few
              tokens, as matrix products, which are many times faster there (most of all in bfloat16, backward)
    xformers  once over the whole sequence, under a block-diagonal mask; needs the package and a CUDA device
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.operations import Operations, attention_products, total_operations
from models.rotary import Turns, turn

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
    found = _SplitHeads.apply(qkv, tuple(shapes), heads)
    for q, k, v in zip(found[::3], found[1::3], found[2::3], strict=True):
        crops, _, tokens, _ = q.shape
        few = qkv.device.type == "cpu" and tokens <= FEW_TOKENS and not fused
        out = (
            _products(q, k, v) if few else F.scaled_dot_product_attention(q, k, v)
        )  # (crops, heads, tokens, width / heads)
        outputs.append(out.transpose(1, 2).reshape(crops * tokens, width))
    return outputs


class _SplitHeads(torch.autograd.Function):
    """``(T, 3 * width)`` → per shape q, k and v ``(crops, heads, tokens, d)``, one behind the other, without a copy.

    Their gradients are written side by side at once. torch would first stack those of a shape, and then join the
    shapes.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, shapes: tuple[Shape, ...], heads: int) -> tuple[Tensor, ...]:
        ctx.shapes, ctx.heads = shapes, heads
        return tuple(_heads(qkv, shapes, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        tokens, width = sum(crops * tokens for crops, tokens in ctx.shapes), ctx.heads * grads[0].shape[-1]
        if torch.compiler.is_compiling():  # of writes into one buffer it makes a walk through all cases for each number
            of_shapes = zip(grads[::3], grads[1::3], grads[2::3], strict=True)
            parts = [torch.stack([x.transpose(1, 2) for x in qkv], dim=2).view(-1, 3 * width) for qkv in of_shapes]
            return torch.cat(parts), None, None
        joined = grads[0].new_empty(tokens, 3 * width)
        for place, grad in zip(_heads(joined, ctx.shapes, ctx.heads), grads, strict=True):
            place.copy_(grad)
        return joined, None, None


def _heads(qkv: Tensor, shapes: Sequence[Shape], heads: int) -> Iterator[Tensor]:
    parts = qkv.split([crops * tokens for crops, tokens in shapes])
    for part, (crops, tokens) in zip(parts, shapes, strict=True):
        yield from part.view(crops, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()


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


class KeysWithoutBias(nn.Linear):
    """The map to queries, keys and values whose third of the bias that is the keys' counts as 0, and gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.bias.chunk(3)
        return F.linear(x, self.weight, torch.cat([queries, torch.zeros_like(keys), values]))


QKV_BIASES = ("all", "no_key", "none")
"""Which of queries, keys and values have a bias."""


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names (``qkv``, ``proj``). ``qkv_bias`` is one of `QKV_BIASES`."""

    def __init__(self, width: int, heads: int, attend: Backend = attend, qkv_bias: str = "all") -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        qkv = KeysWithoutBias if qkv_bias == "no_key" else nn.Linear
        self.qkv = qkv(width, 3 * width, bias=qkv_bias != "none")
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, shapes: Sequence[Shape], rows: Tensor | None = None, turns: Sequence[Turns] | None = None
    ) -> Tensor:
        """``(T, width)`` → ``(T, width)``, attending inside each crop of ``shapes``; or the result's ``rows`` ``(R,)``
        alone. ``turns``: of rotary positions, for each of ``shapes``."""
        found = torch.cat(list(self.attended(x, shapes, turns)))
        return self.proj(found if rows is None else found.index_select(0, rows))

    def attended(self, x: Tensor, shapes: Sequence[Shape], turns: Sequence[Turns] | None = None) -> Sequence[Tensor]:
        """What the last map is given, in parts that lie one behind the other. The kernels keep them for the backward; a
        joined copy would be kept too."""
        qkv = self.qkv(x)
        return self.attend(qkv if turns is None else turn(qkv, shapes, self.heads, turns), shapes, self.heads)

    def products(self, shapes: Sequence[Shape]) -> Operations:
        """Operations between the tokens of crops of ``shapes``."""
        weight = self.proj.weight
        plain = self.attend is attend and weight.device.type == "cpu"
        return total_operations(
            attention_products(crops * tokens**2, weight.shape[0], fused=not (plain and tokens <= FEW_TOKENS))
            for crops, tokens in shapes
        )
