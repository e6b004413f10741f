"""Tiles that another program chose: a slide's tiling from an h5 of coordinates by TRIDENT or CLAM, in place of tissue
detection."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.fault import Fault
from data.slides.coordinates import plan_grid, row_major
from data.slides.coordinates_h5 import SlideCoordinates, read_coordinates_h5
from data.slides.plausible_places import misread
from data.slides.reading import Slide
from data.slides.tiling import KEPT, THUMBNAIL, Tiling, TilingSettings, patient_in

# TRIDENT's and CLAM's "20×" covers scanners from 0.44 to 0.55 µm per pixel. A tile's JSON gives its true µm per pixel.
SAME_MAGNIFICATION = 0.12


@dataclass(frozen=True)
class LeftOutTiles:
    """How many of the file's tiles were left out: over the slide's edge, or given twice."""

    outside: int
    double: int


def find_coordinates(folder: Path, slide: Path, name: str) -> Path:
    """The h5 for the file ``slide``, called ``name`` by us: ``<slide>_patches.h5`` or ``<slide>.h5`` in ``folder``, in
    its ``patches/``, or in the ``patches/`` of one folder inside (TRIDENT's ``20x_256px_0px_overlap``). Raises Fault
    where there is none, or more than one."""
    for stem in dict.fromkeys((slide.stem, name)):
        for inside in ("", "patches/", "*/patches/"):
            found = [
                path for end in ("_patches.h5", ".h5") for path in sorted(folder.glob(f"{inside}{_literal(stem)}{end}"))
            ]
            if len(found) > 1:
                raise Fault(
                    f"{folder} has several files of coordinates for {slide}: {found[0]} and {found[1]}; name the folder"
                    " of one of them"
                )
            if found:
                return found[0]
    raise Fault(
        f"{folder} has no coordinates of {slide} ({slide.stem}_patches.h5 or {slide.stem}.h5): leave this slide out, or"
        " find its tissue here"
    )


def given_tiles(
    slide: Slide, name: str, file: Path, settings: TilingSettings, slides_mpp: float | None, patient_pattern: str
) -> tuple[Tiling, np.ndarray, LeftOutTiles]:
    """The tiling that ``file`` asks for on an open slide, the slide's thumbnail (see `tile_slide`), and what was left
    out.

    Tiles are cut where and as large as the file says. A tile that would hang over the slide's edge is left out: nothing
    is padded, and nothing is moved. Raises Fault where the file's tiles are not of the asked size or scale (within 12
    %), or lie on another slide.
    """
    given = read_coordinates_h5(file)
    if (given.width, given.height) not in ((None, None), (slide.width, slide.height)):
        raise Fault(
            f"{file} is about a slide of {given.width}×{given.height} pixels, and {slide.path} has"
            f" {slide.width}×{slide.height}: give the right folder"
        )
    mpp_level0 = slide.mpp(slides_mpp)
    mpp = mpp_level0 * given.tile_size_level0 / given.tile_size
    if given.tile_size != settings.tile_size or abs(mpp / settings.mpp - 1) > SAME_MAGNIFICATION:
        raise Fault(
            f"{file} asks for tiles of {given.tile_size} pixels at {mpp:.3g} µm per pixel: say"
            f" tile_size={given.tile_size} mpp={mpp:.2g}"
        )
    grid = plan_grid(slide.dimensions, mpp_level0, mpp, given.tile_size, str(slide.path))
    places, left = _usable(given, file, grid.tile_size_level0, slide.width, slide.height)
    thumbnail_downsample = max(1.0, max(slide.width, slide.height) / THUMBNAIL)
    tiling = Tiling(
        name,
        str(slide.path),
        patient_in(slide.path, patient_pattern),
        grid,
        np.full((1, len(places)), KEPT, np.uint8),
        np.full((1, len(places)), np.nan, np.float32),
        thumbnail_downsample,
        places,
    )
    return tiling, slide.thumbnail(thumbnail_downsample), left


def _usable(
    given: SlideCoordinates, file: Path, side: float, width: int, height: int
) -> tuple[np.ndarray, LeftOutTiles]:
    places = np.stack([given.x, given.y], axis=1)
    if wrong := misread(places, side, width=width, height=height, apart=given.apart):
        raise Fault(f"{file} {wrong}: give coordinates in level-0 pixels, or leave this slide out")
    inside = (given.x + side < width + 1) & (given.y + side < height + 1)
    unique = np.unique(places[inside], axis=0)
    unique = unique[row_major(unique[:, 0], unique[:, 1])]
    return unique, LeftOutTiles(int((~inside).sum()), int(inside.sum()) - len(unique))


def _literal(stem: str) -> str:
    """A file's stem for a glob, in which brackets are no pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in stem)
