"""The loader's process, by itself."""

import gc
import os
from collections.abc import Iterator
from typing import ClassVar

from torch.utils.data import IterableDataset

from data.loader_process import LoaderProcess


class Cycle:
    """Lies about until it is collected, and says in which process that was."""

    collected_by: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        self.collected_by.add(os.getpid())


class Collects(IterableDataset):
    def __iter__(self) -> Iterator[tuple[int, bool]]:
        gc.collect()
        yield os.getpid(), os.getpid() in Cycle.collected_by


def test_what_another_run_left_is_tidied_up_here_and_not_in_the_loaders_process() -> None:
    """There it may hold threads that a copied process doesn't have, and to end them is to crash."""
    gc.disable()  # so that chance has no part in it
    try:
        Cycle()
        loader = LoaderProcess(Collects(), pin_memory=False)
        ((there, collected),) = list(loader)
        loader.end()
    finally:
        gc.enable()
    assert there != os.getpid() and not collected
    assert os.getpid() in Cycle.collected_by and gc.get_freeze_count() == 0
