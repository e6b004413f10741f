"""What the data and provenance sections show: slides and their tiles, crops, embeddings as colours, how it was made."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data.embeddings.store import EmbeddingStore, SlideEmbeddings
from data.shards.index import ShardIndex
from pretrain.pages import page
from pretrain.pages.page import Section
from pretrain.report import maps
from pretrain.report.parts import Parts, ReportedRun

MOST_SLIDES = 6
MOST_SAMPLES = 4
SAMPLE_CAPTION = "A row is a tile. First its global crops, masked patches grey; then its local crops, enlarged."


@dataclass(frozen=True)
class SlideFacts:
    """What the shard index says about one slide."""

    name: str
    corners: np.ndarray  # (n, 2) level-0 pixels
    side: float  # tile side, level-0 pixels
    mpp: float
    width: int
    height: int
    thumbnail: Path
    downsample: float  # level-0 pixels per thumbnail pixel


def slides_section(shards: Path) -> Section:
    """The slides, how many tiles each gave, and the tile grid over their thumbnails."""
    index = ShardIndex.open(shards)
    placed = [number for number in range(len(index.slides)) if index.facts(number)["tile_size_level0"]]
    shown = [slide_facts(index, number) for number in chosen(placed, MOST_SLIDES)]
    counts = index.meta["slides"]["tiles"]
    body = page.paragraph(
        f"{len(index):,} tiles of {len(counts):,} slide{'s' * (len(counts) != 1)}, in {len(index.files):,} "
        f"shard{'s' * (len(index.files) != 1)}."
    )
    if not shown:
        return Section(
            "slides",
            "Slides and tiles",
            body + page.paragraph("The shards don't say where on their slides the tiles lie."),
        )
    rows = [
        (
            facts.name,
            f"{facts.width:,} × {facts.height:,}" if facts.width else "unknown",
            f"{facts.mpp:.3f}",
            f"{facts.side:g}",
            f"{len(facts.corners):,}",
        )
        for facts in shown
    ]
    body += page.html_table(
        ("Slide", "pixels at level 0", "µm/px of a tile", "tile side at level 0", "tiles"),
        rows,
        (
            f"{len(shown)} of {len(counts):,} slides are shown; the median slide has {int(np.median(counts)):,} tiles."
            if len(shown) < len(counts)
            else ""
        ),
    )
    pictures = [page.picture_tag(maps.grid(over_thumbnail(facts)), f"tile grid of {facts.name}") for facts in shown]
    body += page.figure(
        page.pair(*pictures),
        caption_of(shown) + " Each square is a tile that was kept; the rest of the slide is faded.",
        "Tile grid.",
    )
    return Section("slides", "Slides and tiles", body)


def slide_facts(index: ShardIndex, number: int) -> SlideFacts:
    """One slide of the index."""
    facts = index.facts(number)
    rows = index.rows_of(number)
    return SlideFacts(
        name=index.slides[number],
        corners=np.stack([index.x[rows], index.y[rows]], axis=1).astype(np.float64),
        side=float(facts["tile_size_level0"] or facts["tile_size"] or 0),
        mpp=float(facts["mpp"] or math.nan),
        width=int(facts["width"] or 0),
        height=int(facts["height"] or 0),
        thumbnail=index.folder / "thumbnails" / f"{index.slides[number]}.jpg",
        downsample=float(facts["thumbnail_downsample"] or 0),
    )


def over_thumbnail(facts: SlideFacts) -> maps.Tiles:
    """The slide's tiles over its thumbnail, or over white paper where shards written by others have none."""
    if facts.thumbnail.is_file() and facts.downsample:
        with Image.open(facts.thumbnail) as image:
            thumbnail = image.convert("RGB")
        return maps.Tiles(thumbnail, facts.downsample, facts.corners, facts.side)
    paper, downsample = maps.blank(facts.corners, facts.side)
    return maps.Tiles(paper, downsample, facts.corners, facts.side, is_blank=True)


def chosen(items: list[Any], most: int) -> list[Any]:
    """At most ``most`` items, evenly spaced."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def caption_of(shown: list[SlideFacts]) -> str:
    """The names of the pictured slides, in order."""
    return (", ".join(facts.name for facts in shown) + ".") if shown else ""


def samples_section(run: ReportedRun) -> Section | None:
    """The crops that the network saw."""
    if not run.samples:
        return None
    body = page.paragraph(
        "The training input itself, after cropping, colour augmentation and masking, turned back into pictures. Tissue"
        " should be recognisable and the colours believable; a fault in the data path shows here first."
    )
    for path in chosen(run.samples, MOST_SAMPLES):
        with Image.open(path) as image:
            image.load()
            body += page.figure(page.picture_tag(image, f"crops, {path.stem}"), SAMPLE_CAPTION, sample_title(path))
    return Section("crops", "What the network saw", body)


def sample_title(path: Path) -> str:
    """``step-00000100.png`` → ``Step 100.``; another name as it is."""
    kind, _, step = path.stem.partition("-")
    return f"{kind.capitalize()} {int(step):,}." if step.isdigit() else f"{path.stem}."


def embeddings_section(store_folder: Path, shards: Path | None) -> Section | None:
    """Tile embeddings as colours on the slide, None for a store without slides."""
    store = EmbeddingStore.open(store_folder)
    names = chosen([name for name in store.slides if store.rows(name)], MOST_SLIDES)
    if not names:
        return None
    slides = [store.read(name) for name in names]
    colouring = maps.fit_colouring([np.asarray(slide.embeddings) for slide in slides])
    index = ShardIndex.open(shards) if shards is not None else None
    figures = []
    for slide in slides:
        tiles = embedded_tiles(slide, index)
        picture = maps.colour_map(tiles, colouring.colours(np.asarray(slide.embeddings)))
        coloured = page.picture_tag(picture, f"principal components of the tile embeddings of {slide.slide}")
        words = "the first three principal components as red, green and blue."
        if tiles.is_blank:
            shown, words = page.pair(coloured), f"{words[0].upper()}{words[1:]} There is no picture of the slide."
        else:
            shown = page.pair(page.picture_tag(tiles.thumbnail, f"thumbnail of {slide.slide}"), coloured)
            words = f"First the slide, then {words}"
        figures.append(page.figure(shown, f"{len(slide.embeddings):,} tiles. {words}", f"{slide.slide}."))
    body = page.paragraph(
        f"Tiles whose embeddings are alike have like colours. The three components hold {colouring.explained:.0%} of"
        f" the variance of the {store.width}-wide embeddings and are shared by all slides shown. Colours should follow"
        " tissue, not the edges of the grid, the scanner's seams or the slide that a tile comes from."
    )
    return Section("embeddings", "What the encoder sees in a slide", body + "".join(figures))


def embedded_tiles(slide: SlideEmbeddings, index: ShardIndex | None) -> maps.Tiles:
    """An embedded slide's tiles over its thumbnail, where the shards have one."""
    corners, side = np.asarray(slide.coordinates, dtype=np.float64), float(slide.tile_size_level0)
    if index is not None and slide.slide in index.slides:
        behind = over_thumbnail(slide_facts(index, index.slides.index(slide.slide)))
        return maps.Tiles(behind.thumbnail, behind.downsample, corners, side, behind.is_blank)
    paper, downsample = maps.blank(corners, side)
    return maps.Tiles(paper, downsample, corners, side, is_blank=True)


def how_section(parts: Parts) -> Section | None:
    """Configuration and provenance of every run."""
    body = ""
    for title, run in (("Tile encoder", parts.tile), ("Slide encoder", parts.slide)):
        if run is None:
            continue
        body += f"<h3>{title}: {page.escape(run.folder)}</h3>"
        if starts := run.provenance.get("starts"):
            times = "1 start" if len(starts) == 1 else f"{len(starts)} starts (the run was continued); this is the last"
            body += page.fact_list(
                [("started", times), *((name, on_one_line(value)) for name, value in starts[-1].items())]
            )
        if run.provenance:
            body += page.folded(
                "All of provenance.json",
                page.preformatted(json.dumps(run.provenance, indent=2, ensure_ascii=False)),
            )
        body += page.folded(
            "The whole configuration",
            page.preformatted(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)),
        )
    if not body:
        return None
    return Section(
        "how",
        "How it was made",
        page.paragraph("Enough to run it again: the same command on the same data gives the same losses.") + body,
    )


def on_one_line(value: object) -> str:
    """A JSON value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {on_one_line(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(on_one_line(inner) for inner in value)
    return str(value)
