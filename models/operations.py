"""Floating-point operations of a pass through a network, from the shapes of its matrices.

Counted are products of matrices, two operations for each multiplication, as torch's counter does; all else is a
thousandth of them. A network says its own in a method ``operations``, beside ``forward``.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from torch import nn


@dataclass(frozen=True)
class Operations:
    """Of a pass: forward, backward, and what of the forward a backward computes anew by either kind of activation
    checkpointing."""

    forward: float = 0.0
    backward: float = 0.0
    full: float = 0.0
    selective: float = 0.0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def without_gradients(self) -> "Operations":
        """Those of a teacher."""
        return Operations(self.forward)


def total_operations(parts: Iterable[Operations]) -> Operations:
    """Of several passes together."""
    return sum(parts, Operations())


def linear_maps(rows: float, *modules: nn.Module, of_data: bool = False) -> Operations:
    """Of ``rows`` tokens through each linear map of ``modules`` once; ``of_data``: their input needs no gradient.

    A linear map is a parameter of more than one row and more than one column, as a token or a scale never is.
    """
    weights = sum(
        parameter.numel()
        for module in modules
        for parameter in module.parameters()
        if parameter.ndim > 1 and min(parameter.shape[:2]) > 1
    )
    forward = 2 * rows * weights
    return Operations(forward, forward if of_data else 2 * forward)


def attention_products(pairs: float, width: float, fused: bool = True) -> Operations:
    """Of attention over ``pairs`` of a query and a key, each of ``width``: scores, and the values they weigh.

    A ``fused`` kernel keeps no scores, so its backward computes them anew. Of plain products selective checkpointing
    keeps nothing.
    """
    one = 2 * pairs * width
    return Operations(2 * one, 5 * one) if fused else Operations(2 * one, 4 * one, selective=2 * one)
