"""Where tiles come from to be embedded: a folder of shards, or the slides themselves, without shards in between.

A source knows its slides by name and size; `open` finds one slide's tiles, and their pixels are then read in any order
from any thread. The same slide gives the same tiles either way: the tissue rule, the grid and the check for empty tiles
are those of ``pretrain shard``. Only JPEG compression is left out where a slide is read directly.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from data.fault import Fault
from data.images import decode_image
from data.remote import Truncated
from data.shards.index import ShardIndex
from data.shards.named_tars import open_shards
from data.shards.open_tars import OpenTars
from data.slides.coordinates import UNKNOWN_PLACE, TileGrid
from data.slides.mpp import SlidesMpp
from data.slides.reading import Slide
from data.slides.shared import SharedSlide
from data.slides.tiling import KEPT, TilingSettings, tile_slide, verdict_of

Pixels = np.ndarray | Fault | None
"""A tile uint8 (H, W, 3); the Fault that says why it can't be read; or None for a tile that isn't kept, once it is read."""


@dataclass(frozen=True)
class TilesToEmbed:
    """One slide's tiles: where they lie, and how to read them. ``read`` takes rows of ``coordinates`` and may run in
    several threads."""

    slide: str
    coordinates: np.ndarray  # (n, 2) int64 level-0 pixels (x, y)
    tile_size_level0: float
    mpp: float  # NaN where nobody recorded it
    read: Callable[[np.ndarray], list[Pixels]]
    tile_size: int = 0  # delivered pixels a side; 0: not known, as below
    slide_width: int = 0
    slide_height: int = 0
    source: str = ""
    close: Callable[[], None] = field(default=lambda: None)
    overruled: str = ""  # what the slide says of its resolution, where the user knows better


class EmbeddingSource(Protocol):
    """Slides by name, with a size each (tiles or bytes) by which work is shared out."""

    slides: list[str]
    sizes: list[int]

    def open(self, slide: str) -> TilesToEmbed:
        """Find a slide's tiles. Raises Fault where that can't be done."""
        ...


class ShardSource:
    """The slides of tile shards, as `open_shards` takes them. Rows are in the order of the tars, so that each is read once
    through. Raises Fault for a slide that is in two folders, and for one some of whose tars aren't named."""

    def __init__(self, shards: Sequence[str]) -> None:
        self.sizes: list[int] = []
        self._places: dict[str, tuple[ShardIndex, int]] = {}
        for index in open_shards(shards):
            for number, tiles in index.tiles_here.items():
                slide = index.slides[number]
                if slide in self._places:
                    raise Fault(
                        f"the slide {slide} is in {self._places[slide][0].folder} and in {index.folder}: embed each folder"
                        " into an out= of its own."
                    )
                if tiles != index.facts(number)["tiles"]:
                    raise Fault(
                        f"of the slide {slide} the tars that are named hold {tiles} of {index.facts(number)['tiles']}"
                        f" tiles, and it is embedded as a whole: name all of its tars in {index.folder}."
                    )
                self._places[slide] = index, number
                self.sizes.append(tiles)
        self.slides = list(self._places)
        self._tars = OpenTars()

    def tile_side(self) -> float | None:
        """The side in µm of the first slide's tiles; None where nobody recorded it."""
        index, number = next(iter(self._places.values()))
        facts = index.facts(number)
        return float(facts["mpp"]) * float(facts["tile_size"]) if facts["mpp"] and facts.get("tile_size") else None

    def open(self, slide: str) -> TilesToEmbed:
        """Find a slide's tiles. Raises Fault where nobody recorded where they lie on the slide."""
        index, number = self._places[slide]
        rows, facts = index.rows_of(number), index.facts(number)
        places = np.stack([index.x[rows], index.y[rows]], axis=1).astype(np.int64)
        if not facts["tile_size_level0"] or (places == UNKNOWN_PLACE).any():
            raise Fault(
                f"{index.folder} doesn't say where the tiles of {slide} lie (x, y and tile_size_level0 in each tile's"
                " .json), and a slide's sequence needs their places: make the shards with 'pretrain shard'"
            )
        return TilesToEmbed(
            slide,
            places,
            float(facts["tile_size_level0"]),
            float(facts["mpp"]) if facts["mpp"] else float("nan"),
            lambda wanted: self._read(index, rows[wanted]),
            tile_size=int(facts["tile_size"] or 0),
            slide_width=int(facts["width"] or 0),
            slide_height=int(facts["height"] or 0),
        )

    def _read(self, index: ShardIndex, rows: np.ndarray) -> list[Pixels]:
        """Decode tiles of an index, or say of each which one can't be and why."""
        tiles = list[Pixels]()
        for row in rows.tolist():
            try:
                tiles.append(decode_image(self._tars.jpeg(index, row)))
            except (OSError, ValueError, Truncated) as error:
                place = f"({index.x[row]}, {index.y[row]}) in {index.place(index.file_of(row))}"
                tiles.append(Fault(f"the tile at {place} can't be decoded ({error})"))
        return tiles


class SlideSource:
    """Slides read directly. ``names`` gives each file's id; ``slides_mpp`` overrules the resolution that slides
    state."""

    def __init__(self, names: dict[Path, str], settings: TilingSettings, slides_mpp: SlidesMpp) -> None:
        self.settings, self.slides_mpp = settings, slides_mpp
        self._paths = {name: path for path, name in names.items()}
        self.slides = sorted(self._paths)
        self.sizes = [_bytes(self._paths[name]) for name in self.slides]

    def open(self, slide: str) -> TilesToEmbed:
        """Find a slide's tissue and its tiles. Raises Fault for a slide that can't be read, or that isn't tiled (see
        `tile_slide`)."""
        path = self._paths[slide]
        with Slide(path) as opened:
            mpp = self.slides_mpp.of(path)
            overruled = opened.overruled(mpp)
            tiling, _ = tile_slide(opened, slide, self.settings, mpp, "")
        x, y, _ = tiling.tiles(KEPT)
        grid, places = tiling.grid, np.stack([x, y], axis=1)
        shared, least = SharedSlide(path), self.settings.min_saturated
        return TilesToEmbed(
            slide,
            places,
            grid.tile_size_level0,
            grid.mpp,
            lambda rows: [_pixels(shared, grid, *places[row].tolist(), min_saturated=least) for row in rows],
            grid.tile_size,
            grid.width,
            grid.height,
            str(path),
            shared.close,
            overruled,
        )


def _pixels(slide: SharedSlide, grid: TileGrid, x: int, y: int, *, min_saturated: float | None) -> Pixels:
    try:
        tile = slide.read_tile(grid, x, y)
    except Fault as fault:
        return Fault(f"the tile at ({x}, {y}) of {slide.path} can't be read ({fault})")
    return tile if verdict_of(tile, min_saturated) == KEPT else None


def slides_of_part(source: EmbeddingSource, part: int, parts: int) -> list[str]:
    """The slides of task ``part`` (from 1) of ``parts``: every slide is one task's, and their sizes add up to about the
    same.

    The largest slide first goes to whoever has least. A function of the slides and their sizes alone.
    """
    loads = [(0, task) for task in range(1, parts + 1)]
    mine = []
    for size, slide in sorted(zip(source.sizes, source.slides, strict=True), key=lambda pair: (-pair[0], pair[1])):
        load, task = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, task))
        if task == part:
            mine.append(slide)
    return sorted(mine)


def stack_by_shape(tiles: Sequence[Pixels]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tiles of equal shape stacked: (which of ``tiles`` (k,) int64, uint8 (k, H, W, 3)) for each shape."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, tile in enumerate(tiles):
        if isinstance(tile, np.ndarray):
            by_shape.setdefault(tile.shape, []).append(index)
    return [(np.array(chosen), np.stack([tiles[i] for i in chosen])) for chosen in by_shape.values()]  # type: ignore[misc]


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
