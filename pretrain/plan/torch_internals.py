"""What the rehearsal takes from inside of torch, which promises none of it: seen with torch 2.14.

A newer torch may have moved or changed these; ``tests/pretrain/plan/test_torch_internals.py`` says which of them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "FLASH_BACKWARD_OF_CPUS",
    "FLASH_OF_CPUS",
    "READ_A_NUMBER",
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "backward_node",
    "in_backward",
    "newest_node",
    "operator_name",
    "operator_of",
    "overwrites",
    "ranks_of",
    "sequence_number",
    "tree_leaves",
    "tree_map",
    "without_modes",
]


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def backward_node() -> Any:
    """The node of the graph whose backward is running; None outside of one."""
    return torch._C._current_autograd_node()


def newest_node() -> int:
    """The sequence number of the node that a forward pass has made last: see `sequence_number`."""
    return torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]


def sequence_number(node: Any) -> int:
    """Which node of its forward pass one is; the backward's has the same."""
    return node._sequence_nr()  # type: ignore[no-any-return]


def operator_of(function: Any) -> Any:
    """The operator of which a dispatched function is one overload: ``aten.mm`` of ``aten.mm.default``."""
    return function._overloadpacket


def operator_name(function: Any) -> str:
    """Its name, without a namespace."""
    return operator_of(function).__name__  # type: ignore[no-any-return]


def overwrites(function: Any) -> bool:
    """Whether a dispatched function changes one of its arguments."""
    return function._schema.is_mutable  # type: ignore[no-any-return]


def ranks_of(args: Any) -> tuple[int, ...]:
    """The processes of the group among a collective's arguments, where it comes as an object of C++; none without."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(arg)))
    return ()


_aten = torch.ops.aten
READ_A_NUMBER = _aten._local_scalar_dense.default
FLASH_OF_CPUS = _aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD_OF_CPUS = _aten._scaled_dot_product_flash_attention_for_cpu_backward
