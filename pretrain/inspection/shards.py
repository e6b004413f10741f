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
from data.shards.named_tars import open_shards
from data.shards.open_tars import OpenTars
from data.slides.coordinates import UNKNOWN_PLACE
from data.slides.coordinates_h5 import read_tiling
from pretrain.inspection.drawn_tiles import DrawnTiles
from pretrain.inspection.page import Page
from pretrain.inspection.slides import histogram, mixture_chart, tile_map

MEASURED = 100_000  # tiles whose lengths make the mean; of a larger index so many are drawn


def shards_page(
    folders: Sequence[Path | str], weights: Sequence[float] | None, recipe: str | None, tiles: int, maps: int, seed: int
) -> Page:
    """Sheets of ``tiles`` tiles, the views that ``recipe`` makes of some (None: none), ``maps`` tile maps, histograms,
    and the shares of a mixture by ``weights`` (any scale; None: by their tiles). Tiles that can't be read are named.
    Raises Fault for weights that don't fit the folders, and where not one tile can be read."""
    indices = open_shards(map(str, folders))
    counts = np.array([len(index) for index in indices])
    shares = counts / counts.sum() if weights is None else _shares(weights, len(indices))
    names = [PurePath(redacted(str(index.location).partition("?")[0])).name for index in indices]
    page = Page(f"{', '.join(names)}: tile shards")
    page.facts = [fact for index in indices for fact in _facts(index)]
    of_each = rng(seed, "mixture").multinomial(tiles, shares)
    drawn = DrawnTiles()
    for index, count in zip(indices, of_each.tolist(), strict=True):
        _draw(index, count, seed, drawn)
    drawn.show(page, recipe, seed, "; 'pretrain shards verify' finds all that is wrong")
    if len(indices) > 1:
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
        ("slides", f"{len(index.tiles_here):,}"),
        ("patients", f"{len({facts['patient'][slide] for slide in index.tiles_here} - {None, ''}):,} known"),
        ("digest", index.digest),
    ]


def _mean_length(index: ShardIndex) -> float:
    """Bytes of a JPEG, as `MEASURED` of them say: a billion are not looked through for a figure of two digits."""
    return float(index.length[drawn(len(index), MEASURED, "mean length")].mean())


def _draw(index: ShardIndex, count: int, seed: int, into: DrawnTiles) -> None:
    """Draw ``count`` tiles at random."""
    tars = OpenTars()
    for row in drawn(len(index), count, seed, "inspect", index.digest).tolist():
        try:
            tile = decode_image(tars.jpeg(index, row))
        except (OSError, ValueError, Truncated) as error:
            into.bad.append(
                f"{redacted(index.place(index.file_of(row)))}: the tile at byte {index.offset[row]} is no readable JPEG"
                f" ({error})"
            )
            continue
        place = "place unknown" if index.x[row] == UNKNOWN_PLACE else f"{index.x[row]}, {index.y[row]}"
        into.add(tile, f"{index.slide_of(row)}\n{place}")


def _maps(indices: Sequence[ShardIndex], most: int) -> list[tuple[str, str, Image.Image]]:
    """Where the tiles are on the first ``most`` slides that have a thumbnail."""
    found: list[tuple[str, str, Image.Image]] = []
    for number, index in enumerate(indices):
        for own in index.tiles_here:
            slide, coordinates = index.slides[own], index.meta["slides"]["coordinates"][own]
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
        values = [
            tiles if fact == "tiles" else index.meta["slides"][fact][slide]
            for index in indices
            for slide, tiles in index.tiles_here.items()
            if index.meta["slides"][fact][slide] is not None
        ]
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
