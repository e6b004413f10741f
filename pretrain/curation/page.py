"""The page of a curation: how even clusters and slides were and are, and tiles of some clusters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from data.files import appearing, write_whole
from data.tiles.chosen import SAME_SIDE
from data.tiles.of_shards import ShardTiles
from data.tiles.source import UnreadableTile
from pretrain.inspection.slides import contact_sheet
from pretrain.pages import page as paper
from pretrain.pages.drawing import FAINT, VIOLET, WIDTH, charts, pyplot, svg

TILES_BESIDE = 8  # tiles on a row of a sheet


def require_embedded_tiles(store: EmbeddingStore, tiles: ShardTiles) -> None:
    """Raise Fault where shards hold tiles of another size or µm/px than those of the same slide that were embedded."""
    embedded = {slide for slide in store.slides if store.rows(slide)}
    for index in tiles.indices:
        for number, slide in enumerate(index.slides):
            if slide not in embedded:
                continue
            found, facts = store.read(slide), index.facts(number)
            for name, unit in (("tile_size_level0", "level-0 pixels a side"), ("mpp", "µm/px")):
                ours, theirs = getattr(found, name), float(facts[name] or 0)
                if ours and theirs and abs(theirs / ours - 1) > SAME_SIDE:
                    raise Fault(
                        f"tiles of {slide} have {theirs:g} {unit} in shards={index.folder} and {ours:g} where they were"
                        " embedded: name shards of the tiles that were embedded, or leave shards= out."
                    )


def write_curation_page(out: Path, facts: dict[str, Any], shards: ShardTiles | None) -> None:
    """Write ``index.html`` and its pictures; tiles are shown where ``shards`` hold them."""
    sections = [
        paper.Section("clusters", "Clusters", _clusters(facts)),
        paper.Section("slides", "Slides", _slides(facts)),
        paper.Section("tiles", "Tiles of some clusters", _tiles(out, facts, shards)),
    ]
    lead = f"{facts['taken']:,} tiles a pass, of {facts['tiles']:,} tiles of {facts['slides']:,} slides."
    write_whole(
        out / "index.html",
        paper.document(
            title="Tiles to train on",
            kicker="Slidewright curation",
            lead=lead,
            opening=paper.fact_list([("embeddings of", facts["encoder"]), ("table", "curated.parquet")]),
            sections=sections,
            footer="Written by <code>pretrain curate</code>. Not a medical device.",
        ),
    )


def _clusters(facts: dict[str, Any]) -> str:
    levels = facts["levels"]
    rows = [
        (
            f"level {number}",
            f"{level['clusters']:,}",
            f"{level['clusters'] - level['empty']:,}",
            *(f"{value:,.1f}" for value in level["effective"]),
        )
        for number, level in enumerate(levels, 1)
    ]
    table = paper.html_table(
        ["", "clusters", "with tiles", "as even as, before", "after"],
        rows,
        "As even as so many clusters of equal size: the exponential of the entropy of their shares. The last level is what"
        " is made even; the first may become less so, where many of its clusters had shared out what is common.",
    )
    words = "Share of each cluster, from the largest down, among all tiles and among those of a pass."
    return table + paper.figure(size_chart(levels), words)


def size_chart(levels: Sequence[dict[str, Any]]) -> str:
    """The shares of each level's clusters by rank, before and after, an SVG each."""
    drawn = []
    for number, level in enumerate(levels, 1):
        figure, axis = pyplot().subplots(figsize=(WIDTH / len(levels), 2.8), layout="constrained")
        for curve, colour, name in zip(level["curves"], (FAINT, VIOLET), ("all tiles", "chosen"), strict=True):
            ranks, shares = np.array(curve).T
            axis.plot(ranks, np.where(shares > 0, shares, np.nan), color=colour, label=name)
        axis.set(xscale="log", yscale="log", xlabel="cluster by size")
        axis.minorticks_off()
        axis.set_title(f"level {number}")
        axis.legend()
        drawn.append(svg(figure))
    return charts(drawn, len(levels))


def _slides(facts: dict[str, Any]) -> str:
    before, after = facts["effective_slides"]
    words = (
        f"{facts['slides_taken']:,} of {facts['slides']:,} slides have tiles that are trained on; they are as even as"
        f" {after:,.1f} slides of equal share, and were as {before:,.1f}. slides.csv has them all; these have most:"
    )
    rows = [
        (
            share["slide"],
            f"{share['tiles']:,}",
            f"{share['taken']:,}",
            f"{share['tiles'] / facts['tiles']:.2%}",
            f"{share['taken'] / facts['taken']:.2%}",
        )
        for share in facts["most_taken"]
    ]
    return paper.paragraph(words) + paper.html_table(["slide", "tiles", "a pass", "share before", "after"], rows)


def _tiles(out: Path, facts: dict[str, Any], tiles: ShardTiles | None) -> str:
    if tiles is None:
        return paper.paragraph("No tiles are shown: shards= says where they are, and the same command adds them.")
    figures = []
    for seen in facts["seen"]:
        pictures, captions, lost = [], [], 0
        for slide, x, y, weight in seen["examples"]:
            number = _number(tiles, slide, x, y)
            try:
                pictures += [tiles.read(number)] if number is not None else []
            except UnreadableTile:
                number = None
            if number is None:
                lost += 1
                continue
            captions.append(f"{slide}\n{'not chosen' if not weight else f'{weight} a pass'}")
        words = (
            f"cluster {seen['cluster']} of the top level: {seen['tiles']:,} tiles ({seen['tiles'] / facts['tiles']:.2%}),"
            f" {seen['taken']:,} a pass ({seen['taken'] / facts['taken']:.2%})"
            + (f"; {lost} of those drawn aren't in these shards, or can't be read" if lost else "")
        )
        if not pictures:
            figures.append(paper.paragraph(words))
            continue
        sheet = contact_sheet(pictures, captions, TILES_BESIDE, 110)
        name = f"cluster-{seen['cluster']:06d}.png"
        with appearing(out / name) as partial:
            sheet.save(partial, format="PNG")
        figures.append(paper.figure(paper.linked_picture(name, sheet, words), words))
    return paper.paragraph(
        "From the largest cluster of the top level to the smallest; of each, tiles drawn with equal chances."
    ) + "".join(figures)


def _number(tiles: ShardTiles, slide: str, x: int, y: int) -> int | None:
    """The number of a slide's tile at level-0 ``(x, y)``, None where these shards haven't got it."""
    for which, index in enumerate(tiles.indices):
        if slide in index.slides:
            rows = index.rows_of(index.slides.index(slide))
            here = rows[(index.x[rows] == x) & (index.y[rows] == y)]
            if len(here):
                return tiles.numbering.number(which, int(here[0]))
    return None
