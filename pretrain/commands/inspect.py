"""Look at a slide before cutting it, or at tiles before training on them.

slide=FILE writes which pixels count as tissue, which tiles are kept or rejected and why, and examples of each. It uses
the same code and settings as 'pretrain shard', so it is the place to try a tissue rule. (Tiles that turn out empty or
pale are only found when they are cut, and among the examples here.)

shards=FOLDER writes a sheet of randomly drawn tiles with slide and place, what the network sees of some of them after a
recipe's crops, colours and masks, where the tiles are on the slides, and histograms of resolution and of tiles per
slide. With several folders, and weights= of the mixture they are to be, it shows each one's share and how often its
tiles would come.

data= shows any source that 'pretrain tile' takes, by the same settings: Parquet files, slides read online, mixtures.

All write PNGs and one index.html over them into out=.

Examples:

    pretrain inspect slide=a.svs out=look
    pretrain inspect slide=a.svs out=look tissue=gigapath mpp=1.0
    pretrain inspect slide=a.svs out=look tissue=[otsu,hsv] min_tissue=[0.4,0.6]
    pretrain inspect shards=shards out=look tiles=128 views=openmidnight
    pretrain inspect shards="breast lung" weights=[3,1] out=look
    pretrain inspect data=parquet data.files=hf://datasets/ORG/NAME data.index=index out=look
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from data.fault import Fault
from data.files import require_writable
from data.keyed import rng
from data.slides.mpp import SlidesMpp
from data.slides.reading import Slide
from data.slides.tiling import (
    BACKGROUND,
    KEPT,
    PEN,
    VERDICTS,
    Tiling,
    TilingSettings,
    downsample_for,
    tile_slide,
    verdict_of,
)
from data.slides.tissue import TissueNeeded, pen
from data.tiles.source import TileSource
from models.allowed import ON_DISK, SHARE, SOME, TILE, within
from pretrain.inspection.page import Page, write_page
from pretrain.inspection.shards import shards_page
from pretrain.inspection.slides import contact_sheet, tile_map, tissue_overlay
from pretrain.inspection.sources import source_page
from pretrain.run.progress import say
from pretrain.settings import plugins
from pretrain.settings.tissue_rules import RULES, chosen_rules
from pretrain.training.tile_settings import TileData
from pretrain.training.tile_sources import build_source

EXAMPLES = 8  # tiles of each verdict


@dataclass
class Config:
    slide: Annotated[str | None, ON_DISK]
    shards: list[str] | None
    data: Annotated[Any, TileData]
    out: Annotated[str, ON_DISK]
    mpp: Annotated[float, within(above=0)]
    tile_size: Annotated[int, TILE]
    tissue: Annotated[list[Any], SOME, RULES]
    min_tissue: Annotated[list[float] | None, SHARE]
    min_saturated: Annotated[float | None, SHARE]
    slides_mpp: str | None
    tiles: Annotated[int, within(least=1)]
    maps: Annotated[int, within(least=0)]
    views: str | None
    weights: Annotated[list[float] | None, within(above=0)]
    seed: Annotated[int, within(least=0)]


def run(config: Config) -> None:
    """Write the pictures and the page, and say where they are."""
    out = Path(config.out)
    require_writable(out / "index.html")
    if (config.slide is not None) + bool(config.shards) + (config.data is not None) != 1:
        raise Fault(
            "say what to look at, one of: pretrain inspect slide=FILE, pretrain inspect shards=FOLDER, pretrain inspect"
            " data=parquet data.files=FOLDER"
        )
    if config.slide is not None:
        page = slide_page(config, Path(config.slide))
    elif config.shards:
        page = shards_page(config.shards, config.weights, config.views, config.tiles, config.maps, config.seed)
    else:
        if missing := [f"data.{name}=…" for name in plugins.lacking(config.data, TileSource)]:
            raise Fault(f"say what to look at: {' '.join(missing)}")
        page = source_page(
            build_source(config.data), config.data["min_saturated"], config.views, config.tiles, config.seed
        )
    write_page(out, page)
    for name, value in page.facts:
        say(f"{name:<22} {value}")
    say(f"look at {out / 'index.html'}")


def slide_page(config: Config, path: Path) -> Page:
    """Tissue mask and tile map of one slide. Raises Fault where 'pretrain shard' would refuse the slide."""
    rules = chosen_rules(config.tissue, config.min_tissue)
    settings = TilingSettings(config.mpp, config.tile_size, rules, config.min_saturated)
    mpp = SlidesMpp.parse(config.slides_mpp).of(path)
    with Slide(path) as slide:
        if overruled := slide.overruled(mpp):
            say(overruled)
        tiling, thumbnail = tile_slide(slide, path.stem, settings, mpp, "")
        judged = [_judged(slide, tiling, needed) for needed in rules]
        levels = ", ".join(f"{width}×{height}" for width, height in slide.dimensions)
        examples = _examples(slide, tiling, config)
    grid, counts = tiling.grid, tiling.counts()
    page = Page(path.name)
    page.facts = [
        ("slide", str(path)),
        (
            "size",
            (
                f"{grid.width} × {grid.height} pixels at {grid.mpp_level0:.4g} µm"
                f" ({grid.microns(grid.width) / 1000:.2f} × {grid.microns(grid.height) / 1000:.2f} mm)"
            ),
        ),
        ("levels", levels),
        (
            "tiles",
            (
                f"{grid.tile_size} px at {grid.mpp:.4g} µm/px, {grid.tile_size_level0:.6g} level-0 pixels a side,"
                f" {'resampled' if grid.resampled else 'untouched pixels'} from level {grid.level}"
            ),
        ),
        *(("tissue rule", said) for said, _ in judged),
        ("verdicts", ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)),
    ]
    page.pictures = [
        ("tiles", "Tiles kept and rejected", tile_map(thumbnail, tiling)),
        *(
            (f"tissue-{number}" if number > 1 else "tissue", "Pixels that count as tissue", picture)
            for number, (_, picture) in enumerate(judged, 1)
        ),
        ("examples", "Tiles kept and rejected, some of each, drawn at random", examples),
        ("thumbnail", "The slide", Image.fromarray(thumbnail)),
    ]
    return page


def _judged(slide: Slide, tiling: Tiling, needed: TissueNeeded) -> tuple[str, Image.Image]:
    """What a rule asks for, and what it says of the slide."""
    downsample = downsample_for(needed.rule, tiling.grid, slide.downsamples)
    image = slide.thumbnail(downsample)
    mask = needed.mask(image, str(slide.path))
    ink = pen(image) & ~mask if needed.rule.rejects_pen else np.zeros_like(mask)
    scale = f"judged at {downsample * tiling.grid.mpp_level0:.3g} µm/px"
    said = f"{needed.called}, {scale}; a tile needs {needed.share:.0%} tissue"
    return said, tissue_overlay(image, mask, ink, f"{slide.path.name}   rule {needed.called}")


def _examples(slide: Slide, tiling: Tiling, config: Config) -> Image.Image:
    """Some tiles of each verdict, with the verdict, their share of tissue and their place."""
    tiles, captions = [], []
    for code in (KEPT, BACKGROUND, PEN):
        xs, ys, shares = tiling.tiles(code)
        chosen = np.sort(rng(config.seed, "examples", code).permutation(len(xs))[:EXAMPLES])
        for x, y, share in zip(xs[chosen].tolist(), ys[chosen].tolist(), shares[chosen].tolist(), strict=True):
            tile = slide.read_tile(tiling.grid, x, y)
            verdict = VERDICTS[verdict_of(tile, config.min_saturated) if code == KEPT else code]
            tiles.append(tile)
            captions.append(f"{verdict}, {share:.0%} tissue\n{x}, {y}")
    return contact_sheet(tiles, captions)
