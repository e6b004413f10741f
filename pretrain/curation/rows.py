"""Embeddings that k-means goes over again and again: of a store, mapped and read a chunk at a time, or few and in
memory."""

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.ahead import map_ahead
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.tiles.numbering import Numbering

EUCLIDEAN, COSINE = "euclidean", "cosine"
MOST_ROWS, FEWEST_ROWS = 16_384, 256  # of a chunk
COMPARED = 2**26  # numbers of a chunk and of its distances to all centres, 256 MiB
CHUNKS_AHEAD = 2


class Rows(Protocol):
    """Numbered rows of equal width."""

    @property
    def width(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def chunks(self, size: int, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Rows ``first … last − 1`` (None: to the end) in their order, ``(at most size, width)`` float32 at a time."""
        ...

    def only(self, numbers: np.ndarray) -> "Rows":
        """Some of the rows, by ascending numbers."""
        ...


class RowsInMemory:
    """Rows ``(n, width)`` float32 that are there already."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.width, self.device = values, values.shape[1], values.device

    def __len__(self) -> int:
        return len(self.values)

    def chunks(self, size: int, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        own = self.values[first:last]
        return iter(own.split(size) if len(own) else ())

    def only(self, numbers: np.ndarray) -> "RowsInMemory":
        return RowsInMemory(self.values[torch.from_numpy(numbers).to(self.values.device)])


class StoreRows:
    """The tiles of a store in its order, slide after slide, or some of them; what is read of a chunk is let go with it.

    By ``distance`` they are taken as they are (`EUCLIDEAN`), or at length one (`COSINE`).
    """

    def __init__(
        self, store: EmbeddingStore, device: torch.device, distance: str, numbers: np.ndarray | None = None
    ) -> None:
        self.store, self.device, self.distance, self.width = store, device, distance, store.width
        self.slides = [slide for slide in store.slides if store.rows(slide)]
        self.numbering = Numbering(map(store.rows, self.slides))
        self._numbers = numbers

    def __len__(self) -> int:
        return int(self.numbering.starts[-1]) if self._numbers is None else len(self._numbers)

    def chunks(self, size: int, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        end = len(self) if last is None else last
        for read in map_ahead(
            lambda begin: self._read(begin, min(begin + size, end)), range(first, end, size), 1, CHUNKS_AHEAD
        ):
            rows = torch.from_numpy(read).to(self.device).float()
            yield functional.normalize(rows) if self.distance == COSINE else rows

    def only(self, numbers: np.ndarray) -> "StoreRows":
        own = numbers if self._numbers is None else self._numbers[numbers]
        return StoreRows(self.store, self.device, self.distance, own)

    def _read(self, first: int, last: int) -> np.ndarray:
        wanted = np.arange(first, last) if self._numbers is None else self._numbers[first:last]
        parts = []
        for slide, own in self.numbering.sort_out(wanted):
            part = self.store.read(self.slides[slide]).embeddings[own]
            if not np.isfinite(part).all():
                raise Fault(
                    f"embeddings of {self.slides[slide]} in {self.store.folder} aren't finite: its file is damaged, and the"
                    " slide is to be embedded again into a new folder."
                )
            parts.append(part)
        return np.concatenate(parts)


def chunk_rows(clusters: int, width: int) -> int:
    """How many rows are compared with so many centres at once."""
    return max(FEWEST_ROWS, min(MOST_ROWS, COMPARED // (clusters + width)))


def open_stores(folders: list[str]) -> EmbeddingStore:
    """The tiles of one or several stores. Raises Fault where a folder is none, or they can't be put together."""
    for folder in folders:
        if Path(folder).exists() and not (Path(folder) / "store.json").exists():
            raise Fault(
                f"{folder} is no store of tile embeddings (no store.json): 'pretrain embed' makes one of shards or slides,"
                f" and 'pretrain embed features={folder} out=…' of features that another program made."
            )
    first, *others = [EmbeddingStore.open(Path(folder)) for folder in folders]
    store = reduce(EmbeddingStore.with_slides_of, others, first)
    if not any(map(store.rows, store.slides)):
        raise Fault(f"{', '.join(folders)} holds no tile: embed slides that have some.")
    return store
