"""slide2vec's coordinates, which it keeps in a folder beside that of its features; of every version that was met.

    1, 2        coordinates/<slide>.npy             rows of x, y, tile_size_lv0, target_spacing
    3           coordinates/<slide>.tiles.npz       x, y; the rest in <slide>.tiles.meta.json
    4, 5        tiles/<slide>.coordinates.npz       x, y, or coordinates; the rest in <slide>.coordinates.meta.json, by chapters

Corners are in level-0 pixels, and rows are those of the features. A class that was annotated has a folder of its own
inside of each.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.fault import Fault
from data.git_lfs import refuse_pointer
from data.npz_files import SPOILT
from data.stated_numbers import stated_number

FOLDERS = ("coordinates", "tiles")
SLIDE2VEC_ENDINGS = (".npy", ".npz", ".coordinates.npz", ".tiles.npz")
# What is told under several names, the newest first.
SPACING = ("requested_spacing_um", "target_spacing_um", "target_spacing")
PIXEL_FACTS = ("requested_tile_size_px", "target_tile_size_px", "target_tile_size")


def beside(features: Path) -> Path | None:
    """The coordinates of the slide whose features lie at ``features``, or None."""
    folder = features.parent
    places = [
        *(folder.parent / name for name in FOLDERS),
        *(folder.parent.parent / name / folder.name for name in FOLDERS),
    ]
    named = [place / f"{features.stem}{ending}" for place in places for ending in SLIDE2VEC_ENDINGS]
    return next((path for path in named if path.is_file()), None)


def read_slide2vec(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Corners, int64 (n, 2), and what is told of the tiles and the slide. ``nominal_mpp`` is the resolution that was
    asked for, from which a slide's own may be a few per cent away. Raises Fault where it is not such a file."""
    refuse_pointer(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        names = loaded.files if path.suffix == ".npz" else loaded.dtype.names or ()
        columns = {name: np.atleast_1d(loaded[name]) for name in names}
    except SPOILT as error:
        raise Fault(f"{path} can't be read as slide2vec's coordinates ({error})") from error
    told = columns | _meta(path)
    corners = columns.get("coordinates")
    if {"x", "y"} <= columns.keys() and columns["x"].shape == columns["y"].shape:
        corners = np.stack([columns["x"], columns["y"]], axis=1)
    if corners is None or corners.ndim != 2 or corners.shape[1] != 2 or corners.dtype.kind not in "fiu":
        raise Fault(f"{path} has no x and y, as slide2vec's coordinates have")

    def first(*names: str) -> float | None:
        return next((stated_number(path, name, told[name]) for name in names if name in told), None)

    width, height = told["dimensions"] if len(np.ravel(told.get("dimensions", 0))) == 2 else (None, None)
    said = {
        "tile_size_level0": first("tile_size_lv0"),
        "tile_size": first(*PIXEL_FACTS),
        "nominal_mpp": first(*SPACING),
        "overlap": first("overlap"),
        "mpp_level0": first("base_spacing_um"),
        "level0_width": stated_number(path, "dimensions", width),
        "level0_height": stated_number(path, "dimensions", height),
    }
    return corners, {name: value for name, value in said.items() if value is not None}


def _meta(path: Path) -> dict[str, Any]:
    """What the JSON beside a file of coordinates says, its chapters ``slide`` and ``tiling`` as if they were none."""
    meta = path.with_suffix(".meta.json")
    if not meta.is_file():
        return {}
    try:
        said = json.loads(meta.read_bytes())
        chapters = [said, *(said[name] for name in ("slide", "tiling") if name in said)]
        return {name: value for chapter in chapters for name, value in chapter.items() if value is not None}
    except (ValueError, OverflowError, RecursionError, AttributeError, TypeError) as error:
        raise Fault(f"{meta} can't be read as what slide2vec says of a slide's tiles ({error})") from error
