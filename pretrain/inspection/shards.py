"""What folders of tile shards consist of, and what a network would see of them: the pages of 'pretrain inspect
shards=…'."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from data.fault import Fault
from data.images import decode_image
from data.keyed import drawn, rng
from data.redaction import redacted
from data.remote import Truncated
from data.shards.index import ShardIndex
from data.shards.open_tars import OpenTars
from data.slides.coordinates import UNKNOWN_PLACE
from data.slides.coordinates_h5 import read_tiling
from pretrain.inspection.page import Page
from pretrain.inspection.slides import contact_sheet, histogram, mixture_chart, tile_map
from pretrain.inspection.views import recipe_settings, seen

SEEN = 8  # tiles whose views are shown
SAID = 10  # unreadable tiles that are named; the rest are counted
MEASURED = 100_000  # tiles whose lengths make the mean; of a larger index so many are drawn


def shards_page(
    folders: Sequence[Path | str], weights: Sequence[float] | None, recipe: str | None, tiles: int, maps: int, seed: int
) -> Page:
    """Sheets of ``tiles`` tiles, the views that ``recipe`` makes of some (None: none), ``maps`` tile maps, histograms,
    and the shares of a mixture by ``weights`` (any scale; None: by their tiles). Tiles that can't be read are named.
    Raises Fault for weights that don't fit the folders, and where not one tile can be read."""
    indices = [ShardIndex.open(folder) for folder in folders]
    counts = np.array([len(index) for index in indices])
    shares = counts / counts.sum() if weights is None else _shares(weights, len(folders))
    names = [PurePath(redacted(str(folder).partition("?")[0])).name for folder in folders]
    page = Page(f"{', '.join(names)}: tile shards")
    page.facts = [fact for index in indices for fact in _facts(index)]
    of_each = rng(seed, "mixture").multinomial(tiles, shares)
    drawn = [_draw(index, int(count), seed) for index, count in zip(indices, of_each, strict=True)]
    pictures = [tile for own, _, _ in drawn for tile in own]
    captions = [caption for _, own, _ in drawn for caption in own]
    bad = [sentence for _, _, own in drawn for sentence in own]
    if bad and not pictures:
        raise Fault(
            f"not one of {len(bad)} tiles can be read: {bad[0]}; 'pretrain shards verify' finds all that is wrong"
        )
    page.facts += [("unreadable", f"{len(bad)} of the {len(bad) + len(pictures)} tiles drawn")] * bool(bad) + [
        ("", sentence) for sentence in bad[:SAID]
    ]
    page.pictures.append(("sheet", f"{len(pictures)} tiles drawn at random", contact_sheet(pictures, captions)))
    if recipe is not None:
        some = [pictures[at] for at in np.linspace(0, len(pictures) - 1, min(SEEN, len(pictures))).astype(int)]
        words = (
            f"What the network sees under recipe={recipe}: a tile a row, global views with masked patches grey, then"
            " local views"
        )
        page.pictures.append(("seen", words, seen(some, recipe_settings(recipe), seed)))
    if len(folders) > 1:
        names = _distinct(names)
        page.facts += [
            (f"share of {name}", f"{share:.1%} of what is drawn, {count / counts.sum():.1%} of the tiles")
            for name, share, count in zip(names, shares, counts, strict=True)
        ]
        page.pictures.append(("mixture", "", mixture_chart(names, counts, shares)))
    page.pictures += _maps(indices, maps)
    return _with_histograms(page, indices)


def _shares(weights: Sequence[float], folders: int) -> np.ndarray:
    if len(weights) != folders or min(weights) <= 0:
        raise Fault(f"weights={list(weights)} must be {folders} positive numbers, one for each folder of shards=")
    return np.array(weights) / sum(weights)


def _facts(index: ShardIndex) -> list[tuple[str, str]]:
    facts = index.meta["slides"]
    return [
        ("shards", redacted(str(index.location))),
        ("tar files", f"{len(index.files):,} ({sum(index.meta['sizes']) / 1e6:,.1f} MB)"),
        ("tiles", f"{len(index):,} of {_mean_length(index) / 1000:.1f} kB"),
        ("slides", f"{len(index.slides):,}"),
        ("patients", f"{len({patient for patient in facts['patient'] if patient}):,} known"),
        ("digest", index.digest),
    ]


def _mean_length(index: ShardIndex) -> float:
    """Bytes of a JPEG, as `MEASURED` of them say: a billion are not looked through for a figure of two digits."""
    return float(index.length[drawn(len(index), MEASURED, "mean length")].mean())


def _draw(index: ShardIndex, count: int, seed: int) -> tuple[list[np.ndarray], list[str], list[str]]:
    """``count`` tiles (H, W, 3) uint8 at random, their captions, and a sentence about each that can't be read."""
    tiles, captions, bad = [], [], []
    tars = OpenTars()
    for row in drawn(len(index), count, seed, "inspect", index.digest).tolist():
        try:
            tiles.append(decode_image(tars.jpeg(index, row)))
        except (OSError, ValueError, Truncated) as error:
            bad.append(
                f"{redacted(index.place(index.file_of(row)))}: the tile at byte {index.offset[row]} is no readable JPEG"
                f" ({error})"
            )
            continue
        place = "place unknown" if index.x[row] == UNKNOWN_PLACE else f"{index.x[row]}, {index.y[row]}"
        captions.append(f"{index.slide_of(row)}\n{place}")
    return tiles, captions, bad


def _maps(indices: Sequence[ShardIndex], most: int) -> list[tuple[str, str, Image.Image]]:
    """Where the tiles are on the first ``most`` slides that have a thumbnail."""
    found: list[tuple[str, str, Image.Image]] = []
    for number, index in enumerate(indices):
        for slide, coordinates in zip(index.slides, index.meta["slides"]["coordinates"], strict=True):
            picture = index.folder / "thumbnails" / f"{slide}.jpg"
            if len(found) == most:
                return found
            if coordinates and picture.exists():
                tiling = read_tiling(index.folder / coordinates)
                stem = f"map-{slide}" if len(indices) == 1 else f"map-{number}-{slide}"
                found.append((stem, "", tile_map(np.asarray(Image.open(picture).convert("RGB")), tiling, 720)))
    return found


def _with_histograms(page: Page, indices: Sequence[ShardIndex]) -> Page:
    for fact, stem, title, label in (
        ("tiles", "tiles-per-slide", "Tiles per slide", "tiles"),
        ("mpp", "mpp", "Resolution of the tiles", "µm per pixel"),
        ("mpp_level0", "mpp-level0", "Resolution of the scanners", "µm per level-0 pixel"),
    ):
        values = [value for index in indices for value in index.meta["slides"][fact] if value is not None]
        if values:
            page.pictures.append((stem, "", histogram(np.array(values), title, label)))
    return page


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where they repeat."""
    often, met = Counter(names), Counter[str]()
    found = []
    for name in names:
        met[name] += 1
        found.append(name if often[name] == 1 else f"{name} ({met[name]})")
    return found
