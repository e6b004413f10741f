"""What tiles an encoder was trained on, and whether those that it is to embed are like them.

The run's provenance has it; an exported folder has it as ``tiles.json``:

    {"tiles": 24000, "pixels": [256, 256], "mpp": [0.5, 0.5, 0.5]}     numbers; height, width; least, median, most µm/px
    {"tiles": 24000, "sizes": [[224, 224, 1.0], [64, 64, 0.5]], …}     of several sizes: of each, with its µm/px
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.json_files import read_object
from pretrain.run.folder import read_starts

TILES_FILE = "tiles.json"
AS_LARGE = 1.1  # times the side of a tile in µm: what counts as the same


def tiles_seen(places: Iterable[Path]) -> dict[str, Any]:
    """Of the first of the places, each an exported folder, a run or a checkpoint of one, that says so; else nothing."""
    for place in places:
        if (place / TILES_FILE).is_file():
            return read_object(place / TILES_FILE, {"tiles"}, "export the encoder again")
        for run in (place, place.parent.parent):
            if (run / "provenance.json").is_file() and (starts := read_starts(run)):
                found: dict[str, Any] = starts[-1].get("tiles") or {}
                return found
    return {}


def sides_seen(seen: dict[str, Any]) -> list[float]:
    """The shorter sides of tiles in µm: of each size, or the least and the most; none where they aren't known."""
    if "sizes" in seen:
        return [min(height, width) * mpp for height, width, mpp in seen["sizes"] if mpp]
    if "mpp" not in seen or "pixels" not in seen:
        return []
    return [min(seen["pixels"]) * mpp for mpp in (seen["mpp"][0], seen["mpp"][-1])]


def unlike_those_seen(seen: dict[str, Any], side: float) -> str | None:
    """A sentence where tiles of a ``side`` in µm are larger or smaller than all that the encoder was trained on; None where
    that isn't so, or isn't known."""
    sides = sides_seen(seen)
    low, high = min(sides, default=0.0), max(sides, default=0.0)
    if not sides or low / AS_LARGE <= side <= high * AS_LARGE:
        return None
    trained = f"{low:.4g} µm" if low == high else f"{low:.4g} to {high:.4g} µm"
    return (
        f"these tiles are {side:.4g} µm a side, and the encoder was trained on tiles of {trained}: it sees tissue at another"
        " scale than it learned"
    )
