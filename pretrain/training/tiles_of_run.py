"""What a run's tiles are, for whoever is handed its encoder: how many, of how many pixels, at how many µm each."""

from typing import Any

import numpy as np

from data.tiles.source import TileSource, UnreadableTile

TILES_ASKED = 32  # evenly spaced: of slides read online, each may open another's grid
TILES_TRIED = 8  # of them, whose size is looked at


def describe_tiles(tiles: TileSource, seed: int) -> dict[str, Any]:
    """``tiles``; ``pixels`` [height, width], or ``sizes`` [height, width, µm/px or None] of each where some that were read
    have others; ``mpp`` [least, median, most] µm/px, where the source knows it. For ``provenance.json``."""
    numbers = np.unique(np.linspace(0, len(tiles) - 1, min(TILES_ASKED, len(tiles))).astype(int)).tolist()
    found: dict[str, Any] = {"tiles": len(tiles)}
    sizes: dict[tuple[int, ...], float | None] = {}
    for number in numbers[:: max(1, len(numbers) // TILES_TRIED)]:
        try:
            sizes.setdefault(tiles.read(number, seed, 0).shape[:2], tiles.mpp(number, seed, 0))
        except UnreadableTile:
            continue
    if len(sizes) > 1:
        found["sizes"] = [[*size, None if mpp is None else round(float(mpp), 4)] for size, mpp in sizes.items()]
    elif sizes:
        found["pixels"] = list(*sizes)
    known = [mpp for sample, number in enumerate(numbers) if (mpp := tiles.mpp(number, seed, sample)) is not None]
    if len(known) == len(numbers):
        found["mpp"] = [round(float(value), 4) for value in np.quantile(known, (0, 0.5, 1))]
    return found
