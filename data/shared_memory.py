"""Memory that a loader process shares with the trainer's, used again and again: fresh pages cost more than decoding
what fills them."""

import math
import os
import weakref

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

HEADER = 64  # bytes before what a slot holds; the first says whether the slot is taken


class Slots:
    """A loader process's slots. One is taken until the last tensor made of it is gone in the process that it was handed
    to.

    Who keeps batches is never overtaken: where every slot is taken there is another. A batch that nobody receives keeps
    its slot, but that happens only when the trainer lets go of the loader, whose process and memory end then.
    """

    def __init__(self, shared: bool = True) -> None:
        self._shared = shared
        self._slots: list[Tensor] = []

    def empty(self, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Unfilled uint8 tensors of these shapes; in a loader process that shares memory, all in one slot."""
        if get_worker_info() is None or not self._shared:
            return [torch.empty(shape, dtype=torch.uint8) for shape in shapes]
        return InSlot(self._take(HEADER + sum(map(math.prod, shapes))), shapes)

    def _take(self, size: int) -> Tensor:
        slot = next((slot for slot in self._slots if not slot[0] and len(slot) >= size), None)
        if slot is None:
            slot = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
            self._slots.append(slot)
        slot[0] = 1
        return slot


class InSlot(list[Tensor]):
    """Tensors in a slot, handed to another process as the slot and their shapes."""

    def __init__(self, slot: Tensor, shapes: list[tuple[int, ...]]) -> None:
        super().__init__(_views(slot, shapes))
        self._handed = os.getpid(), slot, shapes

    def __copy__(self) -> "InSlot":
        return self  # a DataLoader copies lists on their way; the slot is still taken once

    def __reduce__(self) -> tuple[object, ...]:
        return _received, self._handed


_mapped: dict[int, dict[int, Tensor]] = {}  # of the loader process that sent last, by address


def _received(sender: int, slot: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The tensors of a slot, in the process that it was handed to."""
    # Kept, so that the slot's next batch finds its pages mapped: torch gives out a mapping again that is still in use.
    if sender not in _mapped:
        _mapped.clear()
    _mapped.setdefault(sender, {})[slot.data_ptr()] = slot
    # An array of this batch's own, which goes with the last tensor that shares its memory.
    memory = slot.numpy()
    weakref.finalize(memory, _release, slot)
    return _views(torch.from_numpy(memory), shapes)


def _release(slot: Tensor) -> None:
    slot[0] = 0


def _views(memory: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes, one behind the other after the header."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = memory[HEADER : HEADER + sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
