"""What a run's tiles are, for whoever is handed its encoder: how many, of how many pixels, at how many µm each."""

from typing import Any

import numpy as np

from data.tiles.source import TileSource, UnreadableTile

TILES_ASKED = 32  # evenly spaced: of slides read online, each may open another's grid
TILES_TRIED = 8  # of them, until one can be read


def describe_tiles(tiles: TileSource, seed: int) -> dict[str, Any]:
    """``tiles``; ``pixels`` [height, width] of the first that can be read; ``mpp`` [least, median, most] µm/px, where
    the source knows it. For ``provenance.json``."""
    numbers = np.unique(np.linspace(0, len(tiles) - 1, min(TILES_ASKED, len(tiles))).astype(int)).tolist()
    found: dict[str, Any] = {"tiles": len(tiles)}
    for number in numbers[:: max(1, len(numbers) // TILES_TRIED)]:
        try:
            found["pixels"] = list(tiles.read(number, seed, 0).shape[:2])
            break
        except UnreadableTile:
            continue
    known = [mpp for sample, number in enumerate(numbers) if (mpp := tiles.mpp(number, seed, sample)) is not None]
    if len(known) == len(numbers):
        found["mpp"] = [round(float(value), 4) for value in np.quantile(known, (0, 0.5, 1))]
    return found
