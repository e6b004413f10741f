"""What any source of tiles gives a run: the pages of 'pretrain inspect data=…'."""

from collections import Counter
from pathlib import PurePath

import numpy as np

from data.keyed import drawn, rng
from data.redaction import redacted
from data.slides.tissue import saturated_share
from data.tiles.of_parquet import ParquetTiles
from data.tiles.source import TileSource, UnreadableTile
from pretrain.inspection.drawn_tiles import DrawnTiles
from pretrain.inspection.page import Page
from pretrain.inspection.slides import histogram
from pretrain.run.counted import counted_as

ROWS_COUNTED = 1 << 22  # rows at once, of which slide they are
ASKED = 10_000  # tiles whose µm/px make a histogram


def source_page(source: TileSource, min_saturated: float | None, recipe: str | None, tiles: int, seed: int) -> Page:
    """A sheet of ``tiles`` tiles, drawn from each part by its weight, the views that ``recipe`` makes of some (None:
    none), and histograms. Tiles that can't be read are named, and those that ``min_saturated`` would pass over counted.
    Raises Fault where not one can be read."""
    page = Page(f"{', '.join(part.name for part in source.parts)}: tiles")
    blocks = sum(len(part.block_sizes) for part in source.parts)
    page.facts = [("tiles", f"{len(source):,} in {counted_as(blocks, 'block')}")]
    if isinstance(source, ParquetTiles):
        page.facts += _of_parquet(source)
    numbers = _drawn(source, tiles, seed, "inspect", page)
    page.facts.append(("digest", source.digest))
    found = DrawnTiles()
    for sample, number in enumerate(numbers):
        try:
            found.add(source.read(number, seed, sample), _caption(source, number, seed, sample))
        except UnreadableTile as error:
            found.bad.append(redacted(str(error)))
    if min_saturated is not None:
        pale = sum(saturated_share(tile) < min_saturated for tile in found.tiles)
        page.facts.append(("pale", f"{pale} of the {len(found.tiles)} tiles drawn, which training passes over"))
    found.show(page, recipe, seed)
    if isinstance(source, ParquetTiles) and source.index.slides:
        counts = _tiles_of_slides(source)
        page.pictures.append(("tiles-per-slide", "", histogram(counts[counts > 0], "Tiles per slide", "tiles")))
    scales = [source.mpp(number, seed, sample) for sample, number in enumerate(_drawn(source, ASKED, seed, "mpp"))]
    if known := [scale for scale in scales if scale is not None]:
        page.pictures.append(("mpp", "", histogram(np.array(known), "Resolution of the tiles", "µm per pixel")))
    return page


def _drawn(source: TileSource, count: int, seed: int, key: str, page: Page | None = None) -> list[int]:
    """Numbers of tiles, ascending, of each part as many as its weight says; on a ``page`` what is drawn of it."""
    weights = np.array([part.weight for part in source.parts])
    shares = weights / weights.sum()
    numbers: list[int] = []
    first = 0
    for part, share, of_part in zip(
        source.parts, shares, rng(seed, key, "parts").multinomial(count, shares), strict=True
    ):
        size = int(part.block_sizes.sum())
        numbers += (first + drawn(size, int(of_part), seed, key, part.name)).tolist()
        first += size
        if page is not None and len(source.parts) > 1:
            page.facts.append((part.name, f"{share:.1%} of what is drawn, {size / len(source):.1%} of the tiles"))
    return numbers


def _caption(source: TileSource, number: int, seed: int, sample: int) -> str:
    slide, mpp = source.slide(number), source.mpp(number, seed, sample)
    where = source.name(number).partition(" of ")[0] if mpp is None else f"{mpp:.3g} µm/px"
    return f"{PurePath(redacted(slide)).name if slide else 'slide unknown'}\n{where}"


def _of_parquet(source: ParquetTiles) -> list[tuple[str, str]]:
    index = source.index
    held = f"{source.hold_out:.1%} of them held out" if source.hold_out else "none held out"
    whose = Counter(bool(patient) for patient in index.patients)
    return [
        ("files", f"{len(index.files):,} ({index.group_bytes.sum() / 1e6:,.1f} MB of images)"),
        ("row groups", f"{len(index.group_rows):,} of {index.group_rows.mean():.0f} rows"),
        ("slides", f"{len(index.slides):,} known, of {whose[True]:,} of them the patient; {held}"),
        *([("can't be held out", redacted(index.unclear))] if index.unclear else []),
        *(("left out", redacted(why)) for why in index.left_out),
    ]


def _tiles_of_slides(source: ParquetTiles) -> np.ndarray:
    """Rows of each slide, ``(slides,)``: of all, those that are held out among them."""
    index = source.index
    counts = np.zeros(len(index.slides), np.int64)
    for first in range(0, len(index.slide), ROWS_COUNTED):
        counts += np.bincount(index.slide[first : first + ROWS_COUNTED], minlength=len(counts))
    return counts
