"""A GPU that isn't there: torch's fake CUDA tensors, on which a step runs without numbers, and what it would wait for.

A wait is where the host stands still until the device has done all that it was given: a number is read, a shape depends
on numbers, or a copy starts from memory that isn't page-locked. Mixed devices fail, as on a GPU.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves

from models.attention_statistics import run_starts
from models.dilated_attention import lay_out

ROOT = Path(__file__).resolve().parents[2]
OURS = ("data", "models", "pretrain")
GPU = torch.device("cuda", 0)
TOLIST = FakeTensor.tolist
aten = torch.ops.aten
SHAPED_BY_NUMBERS = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
ASKED_FOR_ITS_END = {
    aten.equal.default,
    aten._linalg_check_errors.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
    aten.histc.default,
}  # of a known shape, and yet a number is read
FILLED_WITH = {  # the place of a value that the host reads
    aten.masked_fill.Tensor: 2,
    aten.masked_fill_.Tensor: 2,
    aten.index_fill.int_Tensor: 3,
    aten.index_fill_.int_Tensor: 3,
}


class Waits(TorchDispatchMode):
    """Follows every operation; ``seen`` are the places that wait, ``file:line function``, once a wait, and
    ``operations`` how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.operations = 0
        self._listing = False

    def clear(self) -> None:
        """Begin anew."""
        self.seen.clear()

    def tolist(self, tensor: Tensor) -> Any:
        """What a fake tensor's ``tolist`` gives: it reads number by number, and a GPU's all at once."""
        if self._listing or not on_gpu(tensor):
            return TOLIST(tensor)
        self._note()
        self._listing = True
        try:
            return TOLIST(tensor)
        finally:
            self._listing = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(map(on_gpu, given)) and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with without_modes():  # what the CPU does is done
                return function(*args, **kwargs)
        self.operations += function.namespace == "aten"
        if function is aten._local_scalar_dense.default and on_gpu(args[0]):
            if not self._listing:
                self._note()
            return 1.0 if args[0].is_floating_point() else 1
        if self._waits(function, args, kwargs):
            self._note()
        if function is aten.index.Tensor and (
            masks := [one for one in args[1] if one is not None and not one.dtype.is_signed]
        ):
            return args[0].new_empty(masks[0].numel() // 2, *args[0].shape[masks[0].dim() :])
        of_any_shape = self._shaped_by_numbers(function, kwargs)
        return self._of_any_shape(function, args) if of_any_shape else function(*args, **kwargs)

    @staticmethod
    def _shaped_by_numbers(function: Any, kwargs: Any) -> bool:
        """A size that is given needn't be asked for."""
        return function in SHAPED_BY_NUMBERS and kwargs.get("output_size") is None

    def _of_any_shape(self, function: Any, args: Any) -> Any:
        """A result of a shape that nobody knows: as if half of the numbers were true."""
        some = args[0].numel() // 2
        if function is aten.nonzero.default:
            return args[0].new_empty(some, args[0].dim(), dtype=torch.int64)
        if function is aten.masked_select.default:
            return args[0].new_empty(some)
        raise NotImplementedError(f"{function} at {_place()}: its shape depends on numbers")

    def _waits(self, function: Any, args: Any, kwargs: Any) -> bool:
        if self._shaped_by_numbers(function, kwargs) or function in ASKED_FOR_ITS_END:
            return on_gpu(args[0])
        if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and on_gpu(args[0]):
            indices = [index for index in args[1] if index is not None]
            return any(index.dtype in (torch.bool, torch.uint8) or not on_gpu(index) for index in indices)
        if function is aten._to_copy.default:
            there = torch.device(kwargs.get("device") or args[0].device).type == "cuda"
            return there != on_gpu(args[0]) and not (
                kwargs.get("non_blocking")
                and (not there or (locked(args[0]) and straight(args[0], kwargs.get("dtype"))))
            )
        if function in (aten.copy_.default, aten._foreach_copy_.default):
            pairs = [args[:2]] if function is aten.copy_.default else zip(*args[:2], strict=True)
            return any(_copy_waits(*pair, asynchronous=len(args) > 2 and args[2]) for pair in pairs)
        return function in FILLED_WITH and on_gpu(args[FILLED_WITH[function]])

    def _note(self) -> None:
        self.seen.append(_place())


def _place() -> str:
    """Where in our code an operation was asked for."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS:
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "a test"


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


LOCKED: set[int] = set()  # storages that are said to be page-locked


def locked(tensor: Tensor) -> bool:
    return tensor.untyped_storage()._cdata in LOCKED


def _copy_waits(target: Tensor, source: Tensor, asynchronous: bool) -> bool:
    if on_gpu(target) == on_gpu(source):
        return False
    host, other = (source, target) if on_gpu(target) else (target, source)
    return not (asynchronous and locked(host) and straight(host, other.dtype))


def straight(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a copy to or from the host is one of memory as it lies: else PyTorch lays the numbers out anew, in memory
    that isn't locked (ATen/native/cuda/Copy.cu, copy_requires_temporaries)."""
    return is_non_overlapping_and_dense_or_false(tensor) and dtype in (None, tensor.dtype)


@contextmanager
def fake_gpu() -> Iterator[Waits]:
    """Inside, CUDA tensors are fake ones, ``pin_memory`` says so and does nothing, and a generator is the CPU's."""
    held: list[Tensor] = []  # so that no other storage takes a locked one's place

    def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            held.append(tensor)
            LOCKED.add(tensor.untyped_storage()._cdata)
        return tensor

    generator = torch.Generator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "pin_memory", pin_memory)
        patch.setattr(torch, "Generator", lambda *_: generator())
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
        patch.setattr(torch.cuda, "Event", Mock)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
                patch.setattr(FakeTensor, "tolist", lambda tensor: waits.tolist(tensor))
                yield waits
        finally:
            LOCKED.clear()
            lay_out.cache_clear(), run_starts.cache_clear()  # plans on a GPU that isn't there


def fake_gradients(loss: Tensor, networks: list[torch.nn.Module]) -> None:
    """A backward that gives every trained parameter a gradient: autograd's own wants a driver."""
    assert on_gpu(loss) and loss.requires_grad and not loss.dim()
    for parameter in (one for network in networks for one in network.parameters() if one.requires_grad):
        parameter.grad = torch.empty_like(parameter)


def devices_of(value: Any) -> set[str]:
    """The kinds of device that tensors in nested values are on."""
    return {leaf.device.type for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
