"""Two places of a block that would keep copies of what they can compute anew, as functions with a backward of their own.

An activation before a linear map is needed for the map's weights, and the numbers before it for its own gradient: a
feed-forward network of four widths keeps eight. Rows that are added to others are kept by torch although their gradient
doesn't depend on them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``GELU(x) Wᵀ + b``: ``(T, hidden)`` → ``(T, width)``; kept is ``x``."""
    return _ActivatedLinear.apply(x, weight, bias, F.gelu, torch.ops.aten.gelu_backward)


def swiglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(SiLU(a) * b) Wᵀ + b`` with ``a, b = x``: ``(T, 2 * hidden)`` → ``(T, width)``; kept is ``x``."""
    return _ActivatedLinear.apply(x, weight, bias, swiglu, _swiglu_backward)


def swiglu(x: Tensor) -> Tensor:
    """``SiLU(a) * b`` with ``a, b = x``: ``(…, 2 * hidden)`` → ``(…, hidden)``."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)], dim=-1)


def add_to_rows(x: Tensor, rows: Tensor, part: Tensor, scale: Tensor) -> Tensor:
    """``x`` ``(T, width)`` with ``part * scale`` added to its ``rows`` ``(S,)``, which are distinct: ``part`` ``(S,
    width)``, ``scale`` ``(S, 1)``; kept are ``rows`` and ``scale``."""
    return _AddRows.apply(x, rows, part, scale)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.activation, ctx.backward_of_it = activation, backward
        return F.linear(activation(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            ctx.backward_of_it(grad @ weight, x) if of_x else None,
            grad.mT @ ctx.activation(x) if of_weight else None,
            grad.sum(0) if of_bias else None,
            None,
            None,
        )


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, part: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(rows, scale)
        return x.index_add(0, rows, part * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        rows, scale = ctx.saved_tensors
        return grad, None, grad.index_select(0, rows) * scale, None
