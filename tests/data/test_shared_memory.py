"""Slots: what a loader process fills is what arrives, memory is used again once it is let go of, and never before."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data.shared_memory import Slots

COUNT = 12


class Numbered(IterableDataset[list[Tensor]]):
    """Batches of two tensors that are filled with the batch's number."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        slots = Slots()
        for number in range(COUNT):
            views = slots.empty([(2, 3, 50, 50), (5, 3, 7, 7)])
            for view in views:
                view.fill_(number)
            yield views


def batches() -> Iterator[list[Tensor]]:
    return iter(DataLoader(Numbered(), batch_size=None, num_workers=1, prefetch_factor=2))


def test_memory_that_was_let_go_of_is_used_again() -> None:
    places = set()
    for number, views in enumerate(batches()):
        assert [view.unique().tolist() for view in views] == [[number], [number]]
        places.add(views[0].data_ptr())
    assert len(places) <= COUNT // 2


def test_batches_that_are_kept_are_never_overwritten_not_even_by_way_of_a_part_of_them() -> None:
    kept = [views[1][3:, :1] for views in batches()]
    assert [part.unique().tolist() for part in kept] == [[number] for number in range(COUNT)]
    assert len({part.data_ptr() for part in kept}) == COUNT


def test_without_a_loader_process_memory_is_private() -> None:
    (view,) = Slots().empty([(4, 3)])
    assert view.shape == (4, 3) and view.dtype == torch.uint8 and not view.is_shared()
