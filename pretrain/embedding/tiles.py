"""Slides through a frozen tile encoder into a store of embeddings: read ahead in threads, batched across slides, added
when whole."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data.ahead import map_ahead
from data.embeddings.sources import EmbeddingSource, Pixels, TilesToEmbed, stack_by_shape
from data.embeddings.store import EmbeddingWriter
from data.fault import Fault
from data.files import Refused
from pretrain.run.progress import Progress, say

OPENED_AHEAD = 2  # slides whose tissue is found while others are embedded
BAD_TILES_OF_A_SLIDE_SAID = 20  # of a slide, said one by one; the rest are counted

Start = Callable[[Tensor], Callable[[], Tensor]]
"""Begin to embed uint8 (n, H, W, 3); what it returns waits for the embeddings, float32 (n, width) on the CPU."""


@dataclass
class SlideUnderway:
    """A slide that is being embedded."""

    tiles: TilesToEmbed
    vectors: np.ndarray  # (n, width) float16
    embedded: np.ndarray  # (n,) bool: the tiles that have their vector
    bad: int = 0
    seen: int = 0

    def put(self, rows: np.ndarray, pixels: Sequence[Pixels], vectors: np.ndarray, good: np.ndarray) -> None:
        """Take over the ``vectors`` of some ``rows``, of which only those ``good`` count, and name the bad tiles."""
        self.vectors[rows], self.embedded[rows] = vectors, good
        self.seen += len(rows)
        for tile in pixels:
            if isinstance(tile, Fault):
                self.bad += 1
                if self.bad <= BAD_TILES_OF_A_SLIDE_SAID:
                    say(f"left out: {tile}")

    def add_to(self, writer: EmbeddingWriter, max_bad_fraction: float) -> None:
        """Write the slide. Raises Fault where more of its tiles are bad than is allowed."""
        tiles, n = self.tiles, len(self.embedded)
        if self.bad > max_bad_fraction * n:
            raise Fault(
                f"{self.bad} of {n} tiles of {tiles.slide} can't be decoded: make its shard or its slide good again, "
                f"or allow it with max_bad_fraction={self.bad / n:.3g}"
            )
        writer.add(
            tiles.slide,
            self.vectors[self.embedded],
            tiles.coordinates[self.embedded],
            tiles.tile_size_level0,
            tiles.mpp,
            tile_size=tiles.tile_size,
            slide_width=tiles.slide_width,
            slide_height=tiles.slide_height,
            source=tiles.source,
        )


@dataclass
class Outcomes:
    """What becomes of each slide: written, or left out with a reason."""

    writer: EmbeddingWriter
    max_bad_fraction: float
    progress: Progress
    failed: dict[str, str] = field(default_factory=dict)

    def write(self, underway: SlideUnderway) -> None:
        """Close a slide whose tiles are all seen, and write it or leave it out."""
        underway.tiles.close()
        try:
            underway.add_to(self.writer, self.max_bad_fraction)
        except Refused:
            raise
        except Fault as fault:
            self.leave_out(underway.tiles.slide, fault)
        self.progress.advance(1, underway.tiles.slide)

    def leave_out(self, slide: str, fault: Fault) -> None:
        self.failed[slide] = str(fault)
        say(f"left out: {fault}")


RowsOfSlides = list[tuple[SlideUnderway, np.ndarray]]
"""Rows of one or several slides, one after another."""


@dataclass
class PixelBatch:
    """Rows and their pixels; ``stacked`` has those of a shape together, with their places in ``pixels``."""

    rows: RowsOfSlides
    pixels: list[Pixels]
    stacked: list[tuple[np.ndarray, Tensor]]


def embed_slides(
    start: Start,
    source: EmbeddingSource,
    pending: Sequence[str],
    writer: EmbeddingWriter,
    *,
    batch: int,
    threads: int,
    max_bad_fraction: float,
    pin: bool,
    done: int,
) -> dict[str, str]:
    """Embed the slides ``pending`` in batches that run on from one slide into the next; add each as soon as it is
    whole.

    A tile that can't be read is named and left out of its slide. A slide that can't be opened, or has more such tiles
    than ``max_bad_fraction``, is named and left out: returns these, each with the reason. ``done``: slides that were
    there before. ``pin``: put pixels in page-locked memory, for copies to a GPU that don't wait.
    """
    outcomes = Outcomes(writer, max_bad_fraction, Progress(done + len(pending), "embed", "slides", done=done))
    rows = _batches(_opened(source, pending, outcomes), batch)
    launched: deque[tuple[PixelBatch, list[Callable[[], Tensor]]]] = deque()
    try:
        for found in map_ahead(lambda some: _read(some, pin), rows, threads, threads + 1):
            launched.append((found, [start(images) for _, images in found.stacked]))
            if len(launched) > 1:  # the device works on the next batch while the last one's results are put away
                _put_away(*launched.popleft(), outcomes)
        while launched:
            _put_away(*launched.popleft(), outcomes)
    finally:
        outcomes.progress.close()
    return outcomes.failed


def _opened(source: EmbeddingSource, pending: Sequence[str], outcomes: Outcomes) -> Iterator[SlideUnderway]:
    """The slides that have tiles, in their order; the others are dealt with."""
    for slide, tiles in map_ahead(lambda slide: (slide, _attempt(source, slide)), pending, 1, OPENED_AHEAD):
        if isinstance(tiles, Fault):
            outcomes.leave_out(slide, tiles)
            outcomes.progress.advance(1, slide)
            continue
        if tiles.overruled:
            say(tiles.overruled)
        n = len(tiles.coordinates)
        underway = SlideUnderway(tiles, np.zeros((n, outcomes.writer.width), np.float16), np.zeros(n, bool))
        if n:
            yield underway
        else:  # no tissue: remembered, so that nobody looks again
            outcomes.write(underway)


def _attempt(source: EmbeddingSource, slide: str) -> TilesToEmbed | Fault:
    try:
        return source.open(slide)
    except Fault as fault:
        return fault


def _batches(slides: Iterator[SlideUnderway], size: int) -> Iterator[RowsOfSlides]:
    """Rows of consecutive slides in batches of ``size`` tiles, the last one shorter."""
    parts: RowsOfSlides = []
    room = size
    for underway in slides:
        rows = iter(range(len(underway.embedded)))
        while taken := list(islice(rows, room)):
            parts.append((underway, np.array(taken)))
            room -= len(taken)
            if not room:
                yield parts
                parts, room = [], size
    if parts:
        yield parts


def _read(rows: RowsOfSlides, pin: bool) -> PixelBatch:
    pixels = [tile for underway, wanted in rows for tile in underway.tiles.read(wanted)]
    stacked = [(where, torch.from_numpy(images)) for where, images in stack_by_shape(pixels)]
    return PixelBatch(rows, pixels, [(where, images.pin_memory() if pin else images) for where, images in stacked])


def _put_away(found: PixelBatch, waits: list[Callable[[], Tensor]], outcomes: Outcomes) -> None:
    """Wait for a batch's vectors and give them to their slides; write those that are whole."""
    vectors = np.zeros((len(found.pixels), outcomes.writer.width), np.float16)
    good = np.zeros(len(found.pixels), bool)
    for (where, _), wait in zip(found.stacked, waits, strict=True):
        with np.errstate(over="ignore"):  # the writer refuses infinities, and says where
            vectors[where] = wait().numpy().astype(np.float16)
        good[where] = True
    first = 0
    for underway, rows in found.rows:
        here = slice(first, first + len(rows))
        underway.put(rows, found.pixels[here], vectors[here], good[here])
        first += len(rows)
        if underway.seen == len(underway.embedded):
            outcomes.write(underway)
    outcomes.progress.advance(0)
