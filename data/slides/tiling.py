"""Which tiles of a slide are worth keeping: one look at a thumbnail, before any tile is read.

The result is a `Tiling`: the grid, and for every cell whether its tile is kept, or why not. It is written as
`<slide>_patches.h5` (see `data.slides.coordinates_h5`), beside a small JPEG of the slide, so that nothing later has to
open the slide to show where its tiles are.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from data.fault import Fault
from data.files import write_whole
from data.slides.coordinates import TileGrid, plan_grid
from data.slides.reading import Slide
from data.slides.tissue import TissueNeeded, TissueRule, covered_shares, is_empty, is_fluorescence, pen, saturated_share

BACKGROUND, KEPT, PEN, EMPTY, DAMAGED, PALE = range(6)
VERDICTS = ("background", "kept", "pen", "empty", "damaged", "pale")
# Decided by reading the tile; the others are decided on the thumbnail.
READ = (KEPT, EMPTY, DAMAGED, PALE)

THUMBNAIL = 1024  # longest side of the stored thumbnail, pixels
LARGEST_MASK = 4096  # longest side of the image that a tissue rule judges: at most 50 MB


MOST_PEN = 0.25  # share of ink from which a tile is rejected whatever else is on it
SOME_PEN = 0.15  # share of ink from which a tile with too little tissue is said to be pen, not background


@dataclass(frozen=True)
class TilingSettings:
    """What decides which tiles a slide gives: a tile has enough ``tissue`` by every rule, and, once it is read, at least
    ``min_saturated`` of coloured pixels (see `saturated_share`; None: any)."""

    mpp: float
    tile_size: int
    tissue: tuple[TissueNeeded, ...]
    min_saturated: float | None = None

    def facts(self) -> dict[str, Any]:
        """Grid and rules as JSON has them: what candidate tiles of the same settings have in common. A rule alone is in no
        list."""
        called, shares = [needed.called for needed in self.tissue], [needed.share for needed in self.tissue]
        one = len(self.tissue) == 1
        of_tissue = {"tissue": called[0] if one else called, "min_tissue": shares[0] if one else shares}
        return {"mpp": self.mpp, "tile_size": self.tile_size, **of_tissue}


def verdict_of(tile: np.ndarray, min_saturated: float | None) -> int:
    """`EMPTY`, `PALE` or `KEPT`: what a tile's own pixels, uint8 (H, W, 3 or more), say."""
    if is_empty(tile):
        return EMPTY
    return PALE if min_saturated is not None and saturated_share(tile) < min_saturated else KEPT


@dataclass(frozen=True)
class Tiling:
    """A slide's tiles, and its cells without one. ``verdict`` (rows, columns) uint8 indexes `VERDICTS`; ``tissue``
    (rows, columns) float32 is each cell's share of tissue by the first rule, and ``further`` has those by the others.

    Tiles that another program chose needn't lie on the grid: they are ``places`` (N, 2) int64, level-0 x and y in
    row-major order, ``verdict`` and ``tissue`` are (1, N), and ``tissue`` is NaN, which nobody measured.
    """

    slide: str
    source: str  # the slide's file
    patient: str  # empty where it isn't known
    grid: TileGrid
    verdict: np.ndarray
    tissue: np.ndarray
    thumbnail_downsample: float  # level-0 pixels per pixel of the stored thumbnail
    places: np.ndarray | None = None
    further: tuple[np.ndarray, ...] = ()

    def tiles(self, *verdicts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Level-0 x, y (int64) and tissue share of the cells with one of these verdicts, in row-major order."""
        rows, columns = np.nonzero(np.isin(self.verdict, verdicts))
        if self.places is not None:
            return self.places[columns, 0], self.places[columns, 1], self.tissue[0, columns]
        return self.grid.origin(columns), self.grid.origin(rows), self.tissue[rows, columns]

    def rejected(self, places: list[tuple[int, int, int]]) -> "Tiling":
        """The same with other verdicts for the tiles at these level-0 (x, y, verdict)."""
        verdict = self.verdict.copy()
        given = {} if self.places is None else {tuple(place): i for i, place in enumerate(self.places.tolist())}
        for x, y, code in places:
            verdict[(0, given[x, y]) if given else (self.grid.cell(y), self.grid.cell(x))] = code
        return replace(self, verdict=verdict)

    def counts(self) -> dict[str, int]:
        """How many cells got each verdict."""
        return {name: int((self.verdict == code).sum()) for code, name in enumerate(VERDICTS)}


def tile_slide(
    slide: Slide, name: str, settings: TilingSettings, mpp: float | None, patient_pattern: str
) -> tuple[Tiling, np.ndarray]:
    """Find the tissue of an open slide and judge every cell of its grid.

    Returns the tiling and the slide's thumbnail, uint8 (H, W, 3) with a longest side of at most 1024. ``mpp``, of its
    level 0, overrules what the slide says; the first match of the regular expression ``patient_pattern`` in the file's
    name is the patient.

    Raises Fault for a slide without a plausible mpp, coarser than asked, fluorescent, or smaller than one tile.
    """
    grid = plan_grid(slide.dimensions, slide.mpp(mpp), settings.mpp, settings.tile_size, str(slide.path))
    scales = [downsample_for(needed.rule, grid, slide.downsamples) for needed in settings.tissue]
    thumbnail_downsample = max(1.0, max(slide.width, slide.height) / THUMBNAIL)
    finest = min(*scales, thumbnail_downsample)
    image = slide.thumbnail(finest)
    if is_fluorescence(image):
        raise Fault(
            f"{slide.path} is a fluorescence slide (a dark field), and only stained bright-field slides are tiled:"
            " leave it out"
        )
    if not grid.columns or not grid.rows:
        raise Fault(
            f"{slide.path} ({slide.width}×{slide.height} pixels) is smaller than one tile "
            f"({grid.tile_size_level0:.0f} of its pixels a side): ask for a smaller tile_size or mpp, or leave it out"
        )
    verdict = np.full((grid.rows, grid.columns), KEPT, np.uint8)
    ink = np.zeros(verdict.shape, np.float32)
    shares = []
    for needed, downsample in zip(settings.tissue, scales, strict=True):
        picture = _shrunk(image, downsample / finest)
        left = grid.origin(np.arange(grid.columns)) / downsample
        top = grid.origin(np.arange(grid.rows)) / downsample
        side = grid.tile_size_level0 / downsample
        shares.append(covered_shares(needed.mask(picture, str(slide.path)), left, top, side))
        verdict[shares[-1] < needed.share] = BACKGROUND
        if needed.rule.rejects_pen:
            ink = np.maximum(ink, covered_shares(pen(picture), left, top, side))
    verdict[(ink >= MOST_PEN) | ((verdict == BACKGROUND) & (ink >= SOME_PEN))] = PEN
    patient = patient_in(slide.path, patient_pattern)
    tissue, *further = shares
    tiling = Tiling(name, str(slide.path), patient, grid, verdict, tissue, thumbnail_downsample, further=tuple(further))
    return tiling, _shrunk(image, thumbnail_downsample / finest)


def patient_in(path: Path, pattern: str) -> str:
    """The first match of the regular expression ``pattern`` in a slide's file name, or nothing."""
    match = re.search(pattern, path.name) if pattern else None
    return match.group(0) if match else ""


def downsample_for(rule: TissueRule, grid: TileGrid, levels: Sequence[float]) -> float:
    """Level-0 pixels per pixel of the image that ``rule`` judges, on a slide whose levels have these downsamples: the
    rule's own scale, finer for tiles that would have fewer than 16 of these pixels a side, or its level; coarser where
    the image would have more than 4096."""
    own = min(rule.mpp / grid.mpp_level0, grid.tile_size_level0 / 16)
    if rule.level is not None:
        own = max(downsample for downsample in levels if downsample <= max(rule.level, levels[0]))
    return max(1.0, own, max(grid.width, grid.height) / LARGEST_MASK)


def write_thumbnail(path: Path, image: np.ndarray) -> None:
    """Save a thumbnail (H, W, 3) uint8 as JPEG; it appears under its name only when it is whole."""
    write_whole(path, simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=85))


def _shrunk(image: np.ndarray, factor: float) -> np.ndarray:
    """Area-averaged by ``factor`` ≥ 1; a pixel of the result covers exactly ``factor`` pixels, the last ones perhaps
    less."""
    if factor <= 1.0 + 1e-9:
        return image
    height, width = int(np.ceil(image.shape[0] / factor)), int(np.ceil(image.shape[1] / factor))
    padded = np.pad(
        image,
        (
            (0, max(0, int(np.ceil(height * factor)) - image.shape[0])),
            (0, max(0, int(np.ceil(width * factor)) - image.shape[1])),
            (0, 0),
        ),
        mode="edge",
    )
    box = (0.0, 0.0, width * factor, height * factor)
    return np.asarray(Image.fromarray(padded).resize((width, height), Image.Resampling.BOX, box=box))
