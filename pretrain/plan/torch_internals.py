"""What the rehearsal takes from inside of torch, which promises none of it: seen with torch 2.14.

A newer torch may have moved or changed these; ``tests/pretrain/plan/test_torch_internals.py`` says which of them.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "backward_node",
    "in_backward",
    "newest_node",
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
    """The sequence number of the node that a forward pass has made last, as a node's ``_sequence_nr()`` is."""
    return torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
