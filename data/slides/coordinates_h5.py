"""Tile coordinates as h5 files that TRIDENT's and CLAM's readers take, and reading theirs.

    coords    int64 (N, 2)       level-0 x, y of the kept tiles, row-major; carries the attributes below
    tissue    float32 (N,)       share of tissue of each kept tile
    verdict   uint8 (rows, cols) every cell of the grid: kept, or why not (attribute ``names``)
    share     float16 (rows, cols) share of tissue of every cell
    further   float16 (rules − 1, rows, cols) only where several rules were asked: the shares by the others
    places    int64 (N, 2)       only where another program chose the tiles: see `data.slides.tiling.Tiling`

TRIDENT's attributes: ``patch_size`` (delivered pixels), ``patch_size_level0``, ``level0_magnification,
target_magnification, overlap, name, savetodir, level0_width, level0_height``. CLAM's: ``patch_size, patch_level,
downsample, downsampled_level_dim, level_dim, name, save_path``. Both call something ``patch_size``: for CLAM it counts
pixels of ``patch_level``. The two agree where tiles are pixels of a level; where tiles are resampled they don't, and
CLAM's ``patch_level`` is left out, so that its reader stops instead of reading squares of the wrong size. Ours, beside
them: ``mpp, mpp_level0, tile_size_level0`` (exact), ``slide, source, patient``.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from data.fault import Fault
from data.files import write_whole
from data.h5_files import opened
from data.remote import RemotePath
from data.slides.coordinates import TileGrid
from data.slides.plausible_places import TOO_NEAR, refuse_impossible
from data.slides.tiling import KEPT, VERDICTS, Tiling
from data.stated_numbers import stated_number

COORDINATE_NUMBERS = (
    "patch_size",
    "tile_size_level0",
    "patch_size_level0",
    "downsample",
    "mpp",
    "overlap",
    "level0_width",
    "level0_height",
)
UNSAID = 0.5 / TOO_NEAR  # tiles apart of a file that doesn't say: those that are half a tile apart were cut so


@dataclass(frozen=True)
class SlideCoordinates:
    """Where a slide's tiles are, by whoever found them. ``x, y`` int64 (N,) level-0 pixels, in the file's order;
    ``mpp`` is None where the file doesn't say (CLAM), ``tile_size_level0`` is exact in our files and truncated in
    TRIDENT's. ``apart``: the distance of neighbours, in tiles; where the file doesn't say that they overlap (CLAM) half
    a tile or more is taken for what was meant."""

    slide: str
    x: np.ndarray
    y: np.ndarray
    tile_size: int
    tile_size_level0: float
    mpp: float | None
    width: int | None
    height: int | None
    apart: float = 1.0


def coordinates_path(folder: Path, slide: str) -> Path:
    """Where the coordinates of ``slide`` lie in a folder of shards."""
    return folder / "coordinates" / f"{slide}_patches.h5"


def write_tiling(folder: Path, tiling: Tiling) -> None:
    """Write ``<folder>/coordinates/<slide>_patches.h5``; it appears only when it is whole."""
    path = coordinates_path(folder, tiling.slide)
    grid = tiling.grid
    x, y, tissue = tiling.tiles(KEPT)
    attributes: dict[str, object] = {
        "patch_size": grid.tile_size,
        "patch_size_level0": int(grid.tile_size_level0),
        "level0_magnification": round(10 / grid.mpp_level0),
        "target_magnification": round(10 / grid.mpp),
        "overlap": _overlap(tiling),
        "name": tiling.slide,
        "savetodir": str(path.parent),
        "level0_width": grid.width,
        "level0_height": grid.height,
        "mpp": grid.mpp,
        "mpp_level0": grid.mpp_level0,
        "tile_size_level0": grid.tile_size_level0,
        "level": grid.level,
        "level_downsample": grid.downsample,
        "slide": tiling.slide,
        "source": tiling.source,
        "patient": tiling.patient,
        "thumbnail_downsample": tiling.thumbnail_downsample,
    }
    if not grid.resampled:
        attributes |= {
            "patch_level": grid.level,
            "downsample": np.array([grid.downsample, grid.downsample]),
            "downsampled_level_dim": np.array([int(grid.width / grid.downsample), int(grid.height / grid.downsample)]),
            "level_dim": np.array([int(grid.width / grid.downsample), int(grid.height / grid.downsample)]),
            "save_path": str(path.parent),
        }
    # Made in memory and written as bytes: a full disk is then an OSError, which HDF5 has no word for.
    whole = io.BytesIO()
    with h5py.File(whole, "w") as file:
        coords = file.create_dataset("coords", data=np.stack([x, y], axis=1))
        for key, value in attributes.items():
            coords.attrs[key] = value
        file.create_dataset("tissue", data=tissue)
        verdict = file.create_dataset("verdict", data=tiling.verdict, compression="gzip")
        verdict.attrs["names"] = list(VERDICTS)
        file.create_dataset("share", data=tiling.tissue.astype(np.float16), compression="gzip")
        if tiling.further:
            file.create_dataset("further", data=np.stack(tiling.further).astype(np.float16), compression="gzip")
        if tiling.places is not None:
            file.create_dataset("places", data=tiling.places, compression="gzip")
    write_whole(path, whole.getvalue())


def read_tiling(path: Path | RemotePath) -> Tiling:
    """Read back what `write_tiling` wrote. Raises Fault for a file that is missing, damaged or another program's."""
    with opened(path, "delete it and run again") as file:
        if "verdict" not in file or "share" not in file:
            raise Fault(f"{path} holds no tiling of ours (TRIDENT and CLAM files are read with read_coordinates_h5)")
        of = file["coords"].attrs
        grid = TileGrid(
            int(of["level0_width"]),
            int(of["level0_height"]),
            float(of["mpp_level0"]),
            int(of["patch_size"]),
            float(of["mpp"]),
            float(of["tile_size_level0"]),
            int(of["level"]),
            float(of["level_downsample"]),
        )
        return Tiling(
            str(of["slide"]),
            str(of["source"]),
            str(of["patient"]),
            grid,
            file["verdict"][()],
            file["share"][()].astype(np.float32),
            float(of["thumbnail_downsample"]),
            file["places"][()] if "places" in file else None,
            tuple(file["further"][()].astype(np.float32)) if "further" in file else (),
        )


def _overlap(tiling: Tiling) -> int:
    """Delivered pixels that neighbours share, as TRIDENT means it: from the smallest step between tiles of one row."""
    if tiling.places is None:
        return 0
    step = np.diff(tiling.places[:, 0])[np.diff(tiling.places[:, 1]) == 0]
    scale = tiling.grid.tile_size / tiling.grid.tile_size_level0
    return max(0, tiling.grid.tile_size - round(int(step.min()) * scale)) if len(step) else 0


def read_coordinates_h5(path: Path) -> SlideCoordinates:
    """Tile coordinates from an h5 of ours, TRIDENT's, AtlasPatch's or CLAM's. Raises Fault where the tiles' size can't
    be known from it."""
    with opened(path) as file:
        if "coords" not in file:
            raise Fault(f"{path} has no data set called coords: it isn't a file of tile coordinates")
        coords = file["coords"][()]
        if coords.size and (
            coords.ndim != 2 or coords.shape[1] not in (2, 5)
        ):  # AtlasPatch's have width, height and level too
            raise Fault(f"{path} has coordinates of shape {coords.shape}, not x and y of each tile")
        coords = coords[:, :2] if coords.size else coords.reshape(-1, 2)
        refuse_impossible(path, coords)
        coords = coords.astype(np.int64)
        of = {**file.attrs, **file["coords"].attrs}
        told = {name: stated_number(path, name, of.get(name)) for name in COORDINATE_NUMBERS}
        if (size := told["patch_size"]) is None:
            raise Fault(f"{path} does not say how large its tiles are (no attribute patch_size)")
        side = told["tile_size_level0"] or told["patch_size_level0"] or (told["downsample"] or 0) * size
        if not side:
            raise Fault(
                f"{path} says neither patch_size_level0 nor downsample: its tiles have no known size on the slide"
            )
        width, height = (
            None if (edge := told[f"level0_{name}"]) is None else int(edge) for name in ("width", "height")
        )
        apart = 1 - (told["overlap"] or 0) / size if "overlap" in of else UNSAID
        slide = str(of["name"]) if "name" in of else path.stem.removesuffix("_patches")
        return SlideCoordinates(slide, coords[:, 0], coords[:, 1], int(size), side, told["mpp"], width, height, apart)
