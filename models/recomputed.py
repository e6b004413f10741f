"""A residual branch's two ends on a packed sequence, as functions with a backward of their own.

    x ──take_rows──▶ rows ──norm, attention or fc1──▶ parts
    └─────────────── + ◀──add_linear── γ ⊙ (act(parts) Wᵀ + b), scaled

Operator by operator torch would keep copies of what can be computed anew (an activation before a linear map is needed for
the map's weights, and the numbers before it for its own gradient), and would read and write the sequence many times over:
a layer scale is applied to the map's weights here, which are fewer numbers than its results.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]
"""A function of each row, and its backward: ``(gradient of the result, what came in)`` → ``(gradient of what came in, the
result anew)``."""


def swiglu(x: Tensor) -> Tensor:
    """``SiLU(a) * b`` with ``a, b = x``: ``(…, 2 * hidden)`` → ``(…, hidden)``."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _swiglu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, value = x.chunk(2, dim=-1)
    passed, of_passed = F.silu(gate), grad * value
    if torch.compiler.is_compiling():  # it joins what it fuses, and can't be told where
        return torch.cat([torch.ops.aten.silu_backward(of_passed, gate), grad * passed], dim=-1), passed * value
    of_x = torch.empty_like(x)
    of_gate, of_value = of_x.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(of_passed, gate, grad_input=of_gate)
    torch.mul(grad, passed, out=of_value)
    return of_x, passed * value


NONE: Activation = (lambda x: x, lambda grad, x: (grad, x))
GELU: Activation = (F.gelu, lambda grad, x: (torch.ops.aten.gelu_backward(grad, x), F.gelu(x)))
SWIGLU: Activation = (swiglu, _swiglu_backward)


def take_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` ``(T, width)`` for the way past a branch, and its ``rows`` ``(S,)``, which are distinct, for the way through
    it. The gradients of both ways are added up where they meet, and nowhere else."""
    return _TakenRows.apply(x, rows)


def add_linear(
    x: Tensor,
    parts: Sequence[Tensor],
    linear: nn.Linear,
    gamma: Tensor | None,
    activation: Activation = NONE,
    rows: Tensor | None = None,
    groups: Sequence[tuple[int, float]] = (),
) -> Tensor:
    """``x`` ``(T, width)`` plus ``gamma ⊙ linear(act(parts))``, ``gamma`` ``(width,)`` or None for 1; kept are ``parts``.

    ``parts`` ``(S_i, inputs)`` lie one behind the other, S rows in all. ``rows`` ``(S,)``: the rows of ``x``, distinct,
    that they are added to; None: all of them in order. ``groups`` says how many of ``rows`` are scaled by how much;
    there are as many parts as groups, or one. ``linear`` is a plain one with a bias, outside of autocast: its weights are
    used, and it isn't called.
    """
    return _AddedLinear.apply(x, rows, tuple(groups), activation, linear.weight, linear.bias, gamma, *parts)


class _TakenRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_rows: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.index_add(0, rows, of_rows), None


class _AddedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor | None,
        groups: tuple[tuple[int, float], ...],
        activation: Activation,
        weight: Tensor,
        bias: Tensor,
        gamma: Tensor | None,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, gamma, *parts)
        ctx.groups, ctx.activation = groups, activation
        scaled = _scaled(weight, bias, gamma)
        found = [F.linear(activation[0](part), *scaled) for part in parts]
        if rows is None:
            return x + (found[0] if len(found) == 1 else torch.cat(found))
        sizes = [size for size, _ in groups]
        out = x
        for at, some, (_, scale) in zip(rows.split(sizes), _in_groups(found, sizes), groups, strict=True):
            add = out.index_add if out is x else out.index_add_  # the first one copies
            out = add(0, at, some, alpha=scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, weight, bias, gamma, *parts = ctx.saved_tensors
        of_sum = grad
        if rows is not None:
            of_sum = grad.index_select(0, rows)
            sizes = [size for size, _ in ctx.groups]
            for some, (_, scale) in zip(of_sum.split(sizes), ctx.groups, strict=True):
                some.mul_(scale)
        scaled, _ = _scaled(weight, bias, gamma)
        products, of_bias, of_parts = [], of_sum.sum(0), []
        for part, some in zip(parts, of_sum.split([len(part) for part in parts]), strict=True):
            of_part, came = ctx.activation[1](some @ scaled, part)
            of_parts.append(of_part)
            products.append(some.mT @ came)
        of_weight = reduce(torch.add, products)
        if gamma is None:
            return grad, None, None, None, of_weight, of_bias, None, *of_parts
        # y = γ ⊙ (W a + b), so row by row ∂γ is W · ∂(γ W) + b · ∂(γ b).
        of_gamma = (of_weight * weight).sum(1) + of_bias * bias
        return grad, None, None, None, of_weight * gamma.unsqueeze(1), of_bias * gamma, of_gamma, *of_parts


def _scaled(weight: Tensor, bias: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    return (weight, bias) if gamma is None else (weight * gamma.unsqueeze(1), bias * gamma)


def _in_groups(parts: list[Tensor], sizes: list[int]) -> Sequence[Tensor]:
    return parts if len(parts) == len(sizes) else parts[0].split(sizes)
