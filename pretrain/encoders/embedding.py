"""Slides through a frozen tile encoder into a store of embeddings: read ahead in threads, batched across slides, added
when whole."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data.embeddings.sources import EmbeddingSource, Pixels, TilesToEmbed, stack_by_shape
from data.embeddings.store import EmbeddingWriter
from data.fault import Fault
from data.files import Refused
from pretrain.encoders.ahead import map_ahead
from pretrain.run.progress import Progress, say

OPENED_AHEAD = 2  # slides whose tissue is found while others are embedded
NAMED_BAD_TILES = 20  # of a slide, said one by one; the rest are counted

Start = Callable[[Tensor], Callable[[], Tensor]]
"""Begin to embed uint8 (n, H, W, 3); what it returns waits for the embeddings, float32 (n, width) on the CPU."""


@dataclass
class Half:
    """A slide that is being embedded."""

    tiles: TilesToEmbed
    vectors: np.ndarray  # (n, width) float16
    whole: np.ndarray  # (n,) bool: those that have an embedding
    bad: int = 0
    seen: int = 0


@dataclass
class PixelBatch:
    """Rows of one or several slides and their pixels, one after another."""

    parts: list[tuple[Half, np.ndarray]]
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
    progress = Progress(done + len(pending), "embed", "slides", done=done)
    failed: dict[str, str] = {}

    def finish(half: Half) -> None:
        tiles, n = half.tiles, len(half.whole)
        tiles.close()
        try:
            if half.bad > max_bad_fraction * n:
                raise Fault(
                    f"{half.bad} of {n} tiles of {tiles.slide} can't be decoded: make its shard or its slide good again, or allow it with "
                    f"max_bad_fraction={half.bad / n:.3g}"
                )
            writer.add(
                tiles.slide, half.vectors[half.whole], tiles.coordinates[half.whole], tiles.tile_size_level0, tiles.mpp,
                tile_size=tiles.tile_size, slide_width=tiles.slide_width, slide_height=tiles.slide_height, source=tiles.source,
            )  # fmt: skip
        except Refused:
            raise
        except Fault as fault:
            fail(tiles.slide, fault)
        progress.advance(1, tiles.slide)

    def fail(slide: str, fault: Fault) -> None:
        failed[slide] = str(fault)
        say(f"left out: {fault}")

    def opened() -> Iterator[Half]:
        for slide, tiles in map_ahead(lambda slide: (slide, _attempt(source, slide)), pending, 1, OPENED_AHEAD):
            if isinstance(tiles, Fault):
                fail(slide, tiles)
                progress.advance(1, slide)
                continue
            if tiles.overruled:
                say(tiles.overruled)
            n = len(tiles.coordinates)
            half = Half(tiles, np.zeros((n, writer.width), np.float16), np.zeros(n, bool))
            if n:
                yield half
            else:  # no tissue: remembered, so that nobody looks again
                finish(half)

    def read(parts: list[tuple[Half, np.ndarray]]) -> PixelBatch:
        pixels = [tile for half, rows in parts for tile in half.tiles.read(rows)]
        stacked = [(where, torch.from_numpy(images)) for where, images in stack_by_shape(pixels)]
        return PixelBatch(parts, pixels, [(where, images.pin_memory() if pin else images) for where, images in stacked])

    def collect(found: PixelBatch, waits: list[Callable[[], Tensor]]) -> None:
        vectors = np.zeros((len(found.pixels), writer.width), np.float16)
        good = np.zeros(len(found.pixels), bool)
        for (where, _), wait in zip(found.stacked, waits, strict=True):
            with np.errstate(over="ignore"):  # the writer refuses infinities, and says where
                vectors[where] = wait().numpy().astype(np.float16)
            good[where] = True
        first = 0
        for half, rows in found.parts:
            here = slice(first, first + len(rows))
            half.vectors[rows], half.whole[rows] = vectors[here], good[here]
            for tile in found.pixels[here]:
                if isinstance(tile, Fault):
                    half.bad += 1
                    if half.bad <= NAMED_BAD_TILES:
                        say(f"left out: {tile}")
            half.seen, first = half.seen + len(rows), first + len(rows)
            if half.seen == len(half.whole):
                finish(half)
        progress.advance(0)

    launched: deque[tuple[PixelBatch, list[Callable[[], Tensor]]]] = deque()
    try:
        for found in map_ahead(read, _batches(opened(), batch), threads, threads + 1):
            launched.append((found, [start(images) for _, images in found.stacked]))
            if len(launched) > 1:  # the device works on the next batch while the last one's results are put away
                collect(*launched.popleft())
        while launched:
            collect(*launched.popleft())
    finally:
        progress.close()
    return failed


def _attempt(source: EmbeddingSource, slide: str) -> TilesToEmbed | Fault:
    try:
        return source.open(slide)
    except Fault as fault:
        return fault


def _batches(slides: Iterator[Half], size: int) -> Iterator[list[tuple[Half, np.ndarray]]]:
    """Rows of consecutive slides in batches of ``size`` tiles, the last one shorter."""
    parts: list[tuple[Half, np.ndarray]] = []
    room = size
    for half in slides:
        rows = iter(range(len(half.whole)))
        while taken := list(islice(rows, room)):
            parts.append((half, np.array(taken)))
            room -= len(taken)
            if not room:
                yield parts
                parts, room = [], size
    if parts:
        yield parts
