"""Which tensors of a rehearsal have known numbers: those made of nothing but shapes, such as a diagonal that is left
out of all pairs.

Fake tensors hold none. How many elements such a mask chooses is a shape that follows, so these are computed for real,
beside.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.plan.torch_internals import (
    FakeTensor,
    operator_name,
    overwrites,
    tree_leaves,
    tree_map,
    without_modes,
)

LARGEST_COMPUTED = 2**22  # elements: more are too slow to compute for the sake of a number


def value_of(tensor: Tensor) -> Tensor | None:
    """A tensor's real numbers, or None where they aren't known."""
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "rehearsed_value", None)
    return (
        tensor
        if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.numel() <= LARGEST_COMPUTED
        else None
    )


def sum_of(tensor: Tensor) -> float | None:
    """The sum of a tensor's real numbers, its one number where it has one, or None where they aren't known."""
    value = value_of(tensor)
    if value is None:
        return None
    with without_modes():
        return value.sum().item() if value.numel() != 1 else value.item()


def follow(function: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Note the numbers of an operation's ``result`` where those of all its arguments are known; forget those that it
    overwrites with others."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    results = [
        leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor) and leaf.numel() <= LARGEST_COMPUTED
    ]
    drawn = torch.Tag.nondeterministic_seeded in function.tags or "empty" in operator_name(function)
    values = [value_of(tensor) for tensor in given]
    if function.namespace != "aten" or not results or drawn or any(value is None for value in values):
        if overwrites(function):
            for leaf in tree_leaves(result):
                if isinstance(leaf, FakeTensor) and value_of(leaf) is not None:
                    leaf.rehearsed_value = None  # type: ignore[attr-defined]
        return
    known = {id(tensor): value for tensor, value in zip(given, values, strict=True)}
    args, kwargs = tree_map(lambda leaf: known.get(id(leaf), leaf), (args, kwargs))
    with without_modes(), torch.no_grad():
        computed = function(*args, **kwargs)
    for leaf, value in zip(tree_leaves(result), tree_leaves(computed), strict=True):
        if isinstance(leaf, FakeTensor):
            leaf.rehearsed_value = value  # type: ignore[attr-defined]
