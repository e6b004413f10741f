"""Pictures of data, for `inspect` and for a run's report: where the tiles of a slide are, which pixels count as tissue,
sheets of tiles, histograms. Each is a function that returns a PIL image."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageDraw, ImageFont

from data.slides.tiling import BACKGROUND, DAMAGED, EMPTY, KEPT, PALE, PEN, VERDICTS, Tiling

Rgb = tuple[int, int, int]

COLOURS: dict[int, Rgb] = {
    KEPT: (23, 135, 84),
    PEN: (230, 126, 16),
    EMPTY: (52, 120, 219),
    DAMAGED: (200, 30, 60),
    PALE: (178, 102, 204),
    BACKGROUND: (150, 150, 150),
}
INK: Rgb = (40, 44, 52)
PAPER: Rgb = (255, 255, 255)
MARGIN = 16


def tile_map(thumbnail: np.ndarray, tiling: Tiling, longest: int = 1200) -> Image.Image:
    """The slide with its grid: kept cells outlined green, rejected ones tinted by the reason, and a legend that counts
    them.

    ``thumbnail`` is uint8 (H, W, 3), with ``tiling.thumbnail_downsample`` level-0 pixels to one of its own.
    """
    canvas, zoom = _enlarged(thumbnail, longest)
    scale = zoom / tiling.thumbnail_downsample
    side = tiling.grid.tile_size_level0 * scale
    tint = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(tint)
    right, bottom = round(tiling.grid.columns * side), round(tiling.grid.rows * side)  # beyond them no whole tile fits
    tint.paste((*PAPER, 150), (right, 0, canvas.width, canvas.height))
    tint.paste((*PAPER, 150), (0, bottom, right, canvas.height))
    for code in (BACKGROUND, PEN, EMPTY, DAMAGED, PALE, KEPT):
        xs, ys, _ = tiling.tiles(code)
        fill = (*PAPER, 150) if code == BACKGROUND else (*COLOURS[code], 28 if code == KEPT else 120)
        outline = (*COLOURS[code], 60 if code == BACKGROUND else 255) if side >= 5 else None
        for x, y in zip((xs * scale).tolist(), (ys * scale).tolist(), strict=True):
            draw.rectangle((x, y, x + side, y + side), fill=fill, outline=outline)
    canvas = Image.alpha_composite(canvas.convert("RGBA"), tint).convert("RGB")
    counts = tiling.counts()
    entries = [
        (COLOURS[code], f"{counts[VERDICTS[code]]:,} {VERDICTS[code]}")
        for code in (KEPT, BACKGROUND, PEN, EMPTY, DAMAGED)
        if counts[VERDICTS[code]] or code == KEPT
    ]
    grid = tiling.grid
    caption = f"{tiling.slide}   {grid.columns} × {grid.rows} cells of {grid.tile_size} px at {grid.mpp:.4g} µm/px"
    return _with_legend(canvas, caption, entries)


def tissue_overlay(
    image: np.ndarray, tissue: np.ndarray, ink: np.ndarray, caption: str, longest: int = 1200
) -> Image.Image:
    """Which pixels of ``image`` (H, W, 3) uint8 count as ``tissue`` and which as ``ink`` (pen), bool (H, W); the rest
    is washed out."""
    shown = image.astype(np.float32)
    other = ~(tissue | ink)
    shown[other] = 0.35 * shown[other] + 0.65 * 255
    shown[ink] = 0.35 * shown[ink] + 0.65 * np.array(COLOURS[PEN], dtype=np.float32)
    padded = np.pad(tissue, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    shown[tissue & ~inner] = COLOURS[KEPT]
    canvas, _ = _enlarged(shown.astype(np.uint8), longest, Image.Resampling.NEAREST)
    entries = [(COLOURS[KEPT], f"tissue {tissue.mean():.1%}")]
    if ink.any():
        entries.append((COLOURS[PEN], f"pen {ink.mean():.1%}"))
    return _with_legend(canvas, caption, entries)


def contact_sheet(
    tiles: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8, side: int = 160
) -> Image.Image:
    """Tiles, each uint8 (H, W, 3), on one sheet, row by row, with up to two lines of caption below each."""
    font = _font(10)
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    cell_width, cell_height = side + 10, side + 12 + 14 * lines
    columns = max(1, min(columns, len(tiles)))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for position, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left = MARGIN // 2 + 5 + position % columns * cell_width
        top = MARGIN // 2 + position // columns * cell_height
        sheet.paste(Image.fromarray(tile).resize((side, side), Image.Resampling.LANCZOS), (left, top))
        for number, line in enumerate(caption.split("\n")):
            draw.text((left, top + side + 3 + 14 * number), _cut_to(line, font, side), fill=INK, font=font)
    return sheet


def histogram(values: np.ndarray, title: str, label: str, bins: int = 40) -> Image.Image:
    """A histogram of ``values`` with its median marked. ``label`` names the axis and its unit."""
    figure = Figure(figsize=(6.4, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    low, high = float(values.min()), float(values.max())
    edges = (
        np.linspace(low, high, bins + 1)
        if high > low
        else np.array([low - 0.5 * abs(low or 1), low + 0.5 * abs(low or 1)])
    )
    axes.hist(values, bins=edges.tolist(), color="#178754", edgecolor="white", linewidth=0.4)
    median = float(np.median(values))
    axes.axvline(median, color="#e67e10", linewidth=1.5, label=f"median {median:.4g}")
    axes.set(xlabel=label, ylabel="slides")
    axes.set_title(title, loc="left")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)  # above: bars may be anywhere
    return _rendered(figure)


def mixture_chart(names: Sequence[str], tiles: np.ndarray, shares: np.ndarray) -> Image.Image:
    """Each data set's share of the tiles that there are and of those that are drawn, and how often each of its tiles
    comes while the whole is passed through once. ``tiles`` (n,) counts, ``shares`` (n,) sum to 1."""
    figure = Figure(figsize=(6.4, 1.3 + 0.55 * len(names)), dpi=110, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    axes.barh(places - 0.19, shares, 0.36, color="#178754", label="of what is drawn")
    axes.barh(places + 0.19, tiles / tiles.sum(), 0.36, color="#b9b9b9", label="of the tiles")
    for place, share, count in zip(places.tolist(), shares.tolist(), tiles.tolist(), strict=True):
        often = share * tiles.sum() / count
        axes.annotate(
            f"{share:.1%}, each of {count:,} tiles {often:.2g}× a pass",
            (share, place - 0.19),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(places, list(names))
    axes.invert_yaxis()
    axes.set(title="Shares of the mixture", xlim=(0, max(1.0, 1.5 * float(shares.max()))))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    return _rendered(figure)


def _rendered(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _enlarged(
    image: np.ndarray, longest: int, how: Image.Resampling = Image.Resampling.BICUBIC
) -> tuple[Image.Image, float]:
    """The image scaled so that its longest side has ``longest`` pixels, and the factor."""
    zoom = longest / max(image.shape[:2])
    size = (round(image.shape[1] * zoom), round(image.shape[0] * zoom))
    return (
        Image.fromarray(np.ascontiguousarray(image)).resize(size, how if zoom > 1 else Image.Resampling.LANCZOS),
        zoom,
    )


def _with_legend(picture: Image.Image, caption: str, entries: Sequence[tuple[Rgb, str]]) -> Image.Image:
    """The picture on paper, with the caption above, and a coloured square and words for each entry below."""
    font, bold = _font(15), _font(17)
    words = [int(font.getlength(text)) + 52 for _, text in entries]
    width = max(picture.width, int(bold.getlength(caption)), 300) + 2 * MARGIN
    placed, row, at = [], 0, MARGIN
    for needed in words:
        if at + needed > width and at > MARGIN:
            row, at = row + 1, MARGIN
        placed.append((at, row))
        at += needed
    sheet = Image.new("RGB", (width, picture.height + 3 * MARGIN + 24 + 28 * (row + 1)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 2), caption, fill=INK, font=bold)
    sheet.paste(picture, (MARGIN, MARGIN + 30))
    draw.rectangle(
        (MARGIN, MARGIN + 30, MARGIN + picture.width - 1, MARGIN + 29 + picture.height), outline=(215, 215, 215)
    )
    for (colour, text), (left, line) in zip(entries, placed, strict=True):
        top = picture.height + 2 * MARGIN + 30 + 28 * line - 4
        draw.rectangle(
            (left, top, left + 17, top + 17), fill=tuple((c + 255) // 2 for c in colour), outline=colour, width=2
        )
        draw.text((left + 25, top - 3), text, fill=INK, font=font)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries: Pillow's own font knows neither µ nor ×."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _cut_to(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, its middle replaced by … where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while keep > 2 and font.getlength(text[: keep // 2] + "…" + text[-(keep - keep // 2) :]) > width:
        keep -= 1
    return text[: keep // 2] + "…" + text[-(keep - keep // 2) :]
