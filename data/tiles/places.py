"""Where tiles lie on their slides: what tells the same tile in shards, in slides, in Parquet files and in a store of
embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TilePlaces:
    """Consecutive tiles of a source: tile ``i`` is of ``slides[slide[i]]``, with its top-left corner at level-0
    ``(x[i], y[i])``, `UNKNOWN_PLACE` where nobody recorded it; ``sides`` are a tile's level-0 pixels a side on each
    slide, 0 where that isn't known."""

    slides: Sequence[str]
    slide: np.ndarray  # (n,) integer
    x: np.ndarray  # (n,) int64
    y: np.ndarray  # (n,) int64
    sides: np.ndarray  # (slides,) float64


def place_keys(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One int64 for each level-0 ``(x, y)``, in row-major order; -1 for a place that nobody recorded."""
    return np.where((x < 0) | (y < 0), -1, (y.astype(np.int64) << 32) | x.astype(np.int64))
