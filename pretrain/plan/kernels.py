"""What an operator is to a GPU: something to start, and bytes to read and write."""

from typing import Any

from torch import Tensor

from pretrain.plan.torch_internals import operator_name, tree_leaves

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


def starts_kernels(function: Any) -> bool:
    """Whether a dispatched function computes, in a kernel or more: views and fresh memory don't."""
    return function.namespace == "aten" and not function.is_view and "empty" not in operator_name(function)


def bytes_moved(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operator reads and writes, uncompiled; none for products and attention, whose time is their
    arithmetic's."""
    name = operator_name(function)
    if name in PRODUCTS or "attention" in name:
        return 0
    tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
