"""The mean and standard deviation of each embedding dimension over a store, to which prediction targets are
standardised."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import write_whole
from data.json_files import read_object

ROWS = 4096  # read at a time
# Slides and tiles looked at. The mean is then within 0.008 of a slide's and 0.002 of a tile's standard deviation of that
# of all of them. A published data set is four terabytes, of which each tile is another page.
MOST_SLIDES_READ, MOST_TILES_READ = 2**14, 2**18


@dataclass(frozen=True)
class Statistics:
    """Per-dimension statistics over ``rows`` tiles. A dimension that never varies has ``std`` 1: its target is 0."""

    mean: np.ndarray  # (width,) float64
    std: np.ndarray  # (width,) float64
    rows: int

    @classmethod
    def of(cls, store: EmbeddingStore, watched: Callable[[list[str]], Iterable[str]] = iter) -> "Statistics":
        """One pass over the store, a few thousand tiles at a time, in float64; Fault when it holds no tiles.

        ``watched`` yields the slides that it is given, each when its turn comes: who wants to see how far it is, or to
        end it.

        Of a store of more than `MOST_SLIDES_READ` slides every so-many-th, and of more than `MOST_TILES_READ` tiles every
        so-many-th of each slide. Chunks are combined pairwise exactly (Chan, Golub & LeVeque 1979), which sums of squares are not
        when the mean is large beside the spread.
        """
        rows, mean, squares = 0, np.zeros(store.width), np.zeros(store.width)
        for chunk in _chunks(store, watched):
            n, centre = len(chunk), chunk.mean(axis=0)
            away = centre - mean
            squares += ((chunk - centre) ** 2).sum(axis=0) + away**2 * (rows * n / (rows + n))
            mean += away * (n / (rows + n))
            rows += n
        if rows == 0:
            raise Fault(
                f"{store.folder} holds no tiles, so there is nothing to standardise by; embed slides that have tissue."
            )
        std = np.sqrt(squares / rows)
        return cls(mean, np.where(std > 1e-6 * (1 + np.abs(mean)), std, 1.0), rows)

    def save(self, path: Path) -> None:
        """Write them as JSON, exactly."""
        write_whole(path, json.dumps({"rows": self.rows, "mean": self.mean.tolist(), "std": self.std.tolist()}))

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what `save` wrote. Raises Fault where it is damaged."""
        content = read_object(path, {"mean", "std", "rows"}, "delete it, and the same command makes it anew")
        return cls(np.array(content["mean"]), np.array(content["std"]), int(content["rows"]))


def _chunks(store: EmbeddingStore, watched: Callable[[list[str]], Iterable[str]]) -> Iterator[np.ndarray]:
    slides = [slide for slide in store.slides if store.rows(slide)]
    slides = slides[:: max(1, -(-len(slides) // MOST_SLIDES_READ))]
    stride = max(1, -(-sum(store.rows(slide) for slide in slides) // MOST_TILES_READ))
    for slide in watched(slides):
        embeddings = store.read(slide).embeddings if stride == 1 else store.scattered_rows(slide, stride)
        for first in range(0, len(embeddings), ROWS):
            yield embeddings[first : first + ROWS].astype(np.float64)
