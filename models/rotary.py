"""Rotary positions on two axes, DINOv3's (Siméoni et al. 2025, after Su et al. 2021): the queries and keys of patches are
turned by angles that grow with the patch's place. Class token and registers have no place, and aren't turned.

    place    of a patch's centre, from -1 to 1 on each axis by itself
    period   100 ^ (2 i / (d / 2)), i < d / 4, for heads of width d
    angle    2π · place / period: d / 4 of the row, then d / 4 of the column
    a head   (a, b), its two halves → (a cos − b sin, b cos + a sin)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BASE_PERIOD = 100.0


class Turns:
    """Cosines and sines ``(patches, d / 2)`` of the patches of one crop size, in float32 or wider.

    No dataclass nor tuple: FSDP casts the tensors in these to the lower precision that a block computes in, and leaves a
    plain object as it is.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin


def check_turns(position_embedding: str, width: int, heads: int) -> None:
    """Raise ValueError for heads that angles of two coordinates don't fill."""
    if position_embedding == "rope" and width // heads % 4:
        raise ValueError(
            f"the heads' width {width // heads} (of width {width} and heads {heads}) must be a multiple of 4, for rotary"
            " positions on two axes"
        )


def periods(head_width: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(head_width / 4,)``: those of the angles of either coordinate."""
    exponent = 2 * torch.arange(head_width // 4, device=device, dtype=dtype) / (head_width // 2)
    return BASE_PERIOD**exponent


def turns_of_grid(
    rows: int, columns: int, head_width: int, scale: float, device: torch.device, dtype: torch.dtype
) -> Turns:
    """Those of a grid of patches, row by row, their places multiplied by ``scale``; in ``dtype``, or float32 where that
    is less exact."""
    wide = torch.promote_types(dtype, torch.float32)
    places = [
        scale * (2 * (torch.arange(count, device=device, dtype=wide) + 0.5) / count - 1) for count in (rows, columns)
    ]
    period = periods(head_width, device, wide)
    of_rows, of_columns = (2 * math.pi * place.unsqueeze(1) / period for place in places)
    shape = (rows, columns, len(period))
    angles = torch.cat([of_rows.unsqueeze(1).expand(shape), of_columns.unsqueeze(0).expand(shape)], dim=2).flatten(0, 1)
    return Turns(angles.cos(), angles.sin())


def turn(qkv: Tensor, shapes: Sequence[tuple[int, int]], heads: int, turns: Sequence[Turns]) -> Tensor:
    """``(T, 3 * width)`` with the queries and keys of patches turned; ``shapes`` and ``turns`` say the crops, tokens and
    angles of each crop size."""
    return _Turned.apply(qkv, tuple(shapes), heads, *(table for each in turns for table in (each.cos, each.sin)))


class _Turned(torch.autograd.Function):
    """Nothing of the sequence is kept: the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, shapes: tuple[tuple[int, int], ...], heads: int, *tables: Tensor) -> Tensor:
        ctx.save_for_backward(*tables)
        ctx.shapes, ctx.heads = shapes, heads
        return _turned(qkv, shapes, heads, tables, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tables = ctx.saved_tensors
        return _turned(grad, ctx.shapes, ctx.heads, tables, -1), None, None, *(None for _ in tables)


def _turned(
    qkv: Tensor, shapes: tuple[tuple[int, int], ...], heads: int, tables: Sequence[Tensor], direction: int
) -> Tensor:
    joined = torch.compiler.is_compiling()  # it fuses what is joined, and writes into a buffer less well
    out = qkv if joined else qkv.clone(memory_format=torch.contiguous_format)
    sizes = [crops * tokens for crops, tokens in shapes]
    parts = []
    for came, place, shape, cos, sin in zip(
        qkv.split(sizes), out.split(sizes), shapes, tables[::2], tables[1::2], strict=True
    ):
        split = (*shape, 3, heads, -1)
        prefix = shape[1] - len(cos)
        a, b = came.reshape(split)[:, prefix:, :2].to(cos.dtype).chunk(2, dim=-1)
        cos, sin = (table.unsqueeze(1).unsqueeze(1) for table in (cos, direction * sin))  # (patches, 1, 1, d / 2)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        if joined:
            whole = came.reshape(split)
            of_patches = torch.cat([turned.to(qkv.dtype), whole[:, prefix:, 2:]], dim=2)
            parts.append(torch.cat([whole[:, :prefix], of_patches], dim=1).reshape(came.shape))
        else:
            place.view(split)[:, prefix:, :2].copy_(turned)
    return torch.cat(parts) if joined else out
