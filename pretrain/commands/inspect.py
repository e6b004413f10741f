"""Look at a slide before cutting it, or at shards before training on them.

slide=FILE writes which pixels count as tissue, and which tiles are kept or rejected and why. It uses the same code and settings as
'pretrain shard', so it is the place to try a tissue rule. (Tiles that turn out empty are only found when they are cut.)

shards=FOLDER writes a sheet of randomly drawn tiles with slide and place, where the tiles are on the slides, and
histograms of resolution and of tiles per slide.

Both write PNGs and one index.html over them into out=.

Examples:

    pretrain inspect slide=a.svs out=look
    pretrain inspect slide=a.svs out=look tissue=gigapath mpp=1.0
    pretrain inspect shards=shards out=look tiles=128
"""

import html
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data.coordinates_h5 import read_tiling
from data.fault import Fault
from data.keyed import rng
from data.shard_index import UNKNOWN, ShardIndex, read_jpeg
from data.slides import Slide
from data.tiling import TilingSettings, downsample_for, tile_slide
from data.tissue import RULES, pen
from pretrain.pictures import contact_sheet, histogram, tile_map, tissue_overlay
from pretrain.progress import say


@dataclass
class Config:
    slide: str | None
    shards: str | None
    out: str
    mpp: float
    tile_size: int
    tissue: str
    min_tissue: float | None
    slides_mpp: float | None
    tiles: int
    maps: int
    seed: int


@dataclass
class Page:
    """Pictures and numbers for one HTML page."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[tuple[str, str, Image.Image]] = field(default_factory=list)  # file stem, caption, picture


def run(config: Config) -> None:
    """Write the pictures and the page, and say where they are."""
    if (config.slide is None) == (config.shards is None):
        raise Fault("say what to look at: pretrain inspect slide=FILE, or pretrain inspect shards=FOLDER")
    page = (
        slide_page(config, Path(config.slide))
        if config.slide is not None
        else shards_page(config, Path(str(config.shards)))
    )
    out = Path(config.out)
    write_page(out, page)
    for name, value in page.facts:
        say(f"{name:<22}{value}")
    say(f"look at {out / 'index.html'}")


def slide_page(config: Config, path: Path) -> Page:
    """Tissue mask and tile map of one slide. Raises Fault where 'pretrain shard' would refuse the slide."""
    if config.tissue not in RULES:
        raise Fault(f"there is no tissue rule {config.tissue!r}; there are: {', '.join(RULES)}")
    rule = RULES[config.tissue]
    min_tissue = rule.min_tissue if config.min_tissue is None else config.min_tissue
    settings = TilingSettings(config.mpp, config.tile_size, config.tissue, min_tissue)
    with Slide(path) as slide:
        tiling, thumbnail = tile_slide(slide, path.stem, settings, config.slides_mpp, "")
        downsample = downsample_for(rule, tiling.grid)
        image = slide.thumbnail(downsample)
        levels = ", ".join(f"{width}×{height}" for width, height in slide.dimensions)
    mask = rule.mask(image)
    ink = pen(image) & ~mask if rule.rejects_pen else np.zeros_like(mask)
    grid, counts = tiling.grid, tiling.counts()
    page = Page(path.name)
    page.facts = [
        ("slide", str(path)),
        ("size", f"{grid.width} × {grid.height} pixels at {grid.mpp_level0:.4g} µm ({grid.microns(grid.width) / 1000:.2f} × {grid.microns(grid.height) / 1000:.2f} mm)"),
        ("levels", levels),
        ("tiles", f"{grid.tile_size} px at {grid.mpp:.4g} µm/px, {grid.tile_size_level0:.6g} level-0 pixels a side, {'resampled' if grid.resampled else 'untouched pixels'} from level {grid.level}"),
        ("tissue rule", f"{config.tissue}, judged at {downsample * grid.mpp_level0:.3g} µm/px; a tile needs {min_tissue:.0%} tissue"),
        ("verdicts", ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)),
    ]  # fmt: skip
    page.pictures = [
        ("tiles", "Tiles kept and rejected", tile_map(thumbnail, tiling)),
        (
            "tissue",
            "Pixels that count as tissue",
            tissue_overlay(image, mask, ink, f"{path.name}   rule {config.tissue}"),
        ),
        ("thumbnail", "The slide", Image.fromarray(thumbnail)),
    ]
    return page


def shards_page(config: Config, folder: Path) -> Page:
    """A sheet of tiles, tile maps, and histograms of a folder of shards."""
    index = ShardIndex.open(folder)
    facts = index.meta["slides"]
    page = Page(f"{folder.name}: tile shards")
    page.facts = [
        ("shards", str(folder)),
        ("tar files", f"{len(index.files):,} ({sum(index.meta['sizes']) / 1e6:,.1f} MB)"),
        ("tiles", f"{len(index):,} of {index.length.mean() / 1000:.1f} kB"),
        ("slides", f"{len(index.slides):,}"),
        ("patients", f"{len({patient for patient in facts['patient'] if patient}):,} known"),
        ("digest", index.digest),
    ]
    rows = np.sort(rng(config.seed, "inspect").choice(len(index), min(config.tiles, len(index)), replace=False))
    page.pictures.append(("sheet", f"{len(rows)} tiles drawn at random", contact_sheet(*_tiles(index, rows))))
    for slide in range(min(config.maps, len(index.slides))):
        name = index.slides[slide]
        picture, coordinates = folder / "thumbnails" / f"{name}.jpg", facts["coordinates"][slide]
        if coordinates and picture.exists():
            tiling = read_tiling(folder / coordinates)
            page.pictures.append(
                (f"map-{name}", "", tile_map(np.asarray(Image.open(picture).convert("RGB")), tiling, 720))
            )
    page.pictures.append(("tiles-per-slide", "", histogram(np.array(facts["tiles"]), "Tiles per slide", "tiles")))
    mpp = np.array([value for value in facts["mpp"] if value is not None])
    if len(mpp):
        page.pictures.append(("mpp", "", histogram(mpp, "Resolution of the tiles", "µm per pixel")))
    mpp_level0 = np.array([value for value in facts["mpp_level0"] if value is not None])
    if len(mpp_level0):
        page.pictures.append(
            ("mpp-level0", "", histogram(mpp_level0, "Resolution of the scanners", "µm per level-0 pixel"))
        )
    return page


def _tiles(index: ShardIndex, rows: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
    """Decoded tiles (H, W, 3) uint8 and their captions. Raises Fault for a tile that can't be read."""
    tiles, captions = [], []
    for row in rows.tolist():
        path = index.path(int(np.searchsorted(index.file_start, row, side="right")) - 1)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            jpeg = read_jpeg(descriptor, int(index.offset[row]), int(index.length[row]))
            tiles.append(simplejpeg.decode_jpeg(jpeg))
        except ValueError as error:
            raise Fault(
                f"{path}: the tile at byte {index.offset[row]} is no readable JPEG ({error}): make this shard again"
            ) from error
        finally:
            os.close(descriptor)
        slide = index.slides[int(index.run_slide[np.searchsorted(index.run_start, row, side="right") - 1])]
        place = "place unknown" if index.x[row] == UNKNOWN else f"{index.x[row]}, {index.y[row]}"
        captions.append(f"{slide}\n{place}")
    return tiles, captions


def write_page(out: Path, page: Page) -> None:
    """Write the pictures as PNG and ``index.html`` over them."""
    out.mkdir(parents=True, exist_ok=True)
    figures = []
    for stem, caption, picture in page.pictures:
        picture.save(out / f"{stem}.png")
        words = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        figures.append(
            f'<figure>{words}<a href="{stem}.png"><img src="{stem}.png" alt="{html.escape(caption or stem)}"></a></figure>'
        )
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in page.facts)
    (out / "index.html").write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(page.title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #282c34; max-width: 1500px; margin: 2em auto; padding: 0 1.5em }}
h1 {{ font-size: 1.5em }} th {{ text-align: left; padding-right: 2em; font-weight: 600; vertical-align: top }}
main {{ display: flex; flex-wrap: wrap; gap: 1.5em; margin-top: 1.5em; align-items: flex-start }}
figure {{ margin: 0 }} figcaption {{ font-weight: 600; margin-bottom: .4em }} img {{ max-width: 100%; border: 1px solid #ddd }}
</style></head><body><h1>{html.escape(page.title)}</h1><table>{rows}</table><main>{"".join(figures)}</main></body></html>
""",
        encoding="utf-8",
    )
