"""The sequences that a run's settings make of a store of embeddings, and a rank's share of their batches."""

from collections.abc import Collection, Iterator

import numpy as np
from torch.utils.data import IterableDataset

from data.embeddings.grid_crops import CropSequences
from data.embeddings.sequences import SlideBatch, SlideSequences
from data.embeddings.standardisation import Statistics
from data.embeddings.store import EmbeddingStore
from pretrain.objectives.interface import SlideObjective
from pretrain.training.slide_settings import SlideData


class SlideBatches(IterableDataset["list[SlideBatch]"]):
    """A rank's share of global batches ``start … stop − 1``, each a list of micro-batches."""

    def __init__(
        self, sequences: SlideSequences, start: int, stop: int, rank: int, world_size: int, accumulate: int
    ) -> None:
        self.sequences, self.start, self.stop = sequences, start, stop
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate

    def __iter__(self) -> Iterator[list[SlideBatch]]:
        parts, first = self.world_size * self.accumulate, self.rank * self.accumulate
        for step in range(self.start, self.stop):
            yield [self.sequences.batch(step, first + i, parts) for i in range(self.accumulate)]


def sequences_of(
    store: EmbeddingStore,
    statistics: Statistics,
    data: SlideData,
    seed: int,
    kind: type[SlideObjective],
    centres: np.ndarray | None = None,
    further: Collection[tuple[EmbeddingStore, Statistics]] = (),
) -> SlideSequences:
    """The sequences that a run's settings make of a store, as an objective of this ``kind`` wants them. ``centres``: of
    clusters, for one that asks for them. ``further``: stores beside the first. Raises Fault as `SlideSequences` does."""
    others = ("embeddings", "further", "slides", "slides_share", "processes_per_slide", "crops")
    settings = {name: value for name, value in vars(data).items() if name not in others}
    if not kind.masks:
        settings["mask_ratio"] = 0.0
    settings |= {"seed": seed, "centres": centres, "further": further}
    if not kind.crops:
        return SlideSequences(store, statistics, **settings)
    crops = vars(data.crops) | ({} if kind.masks else {"masked_share": 0.0})
    return CropSequences(store, statistics, **settings, **crops)
