"""Where tiles come from, as one interface: numbered tiles, dealt out in blocks, read in any order from any thread.

Shards (`data.tiles.of_shards`), slides read online (`data.tiles.of_slides`) and mixtures of sources
(`data.tiles.mixture`) are the ones there are; the stream deals in numbers and blocks and knows none of them. A new
source is one class with these members.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from data.fault import Fault
from data.images import decode_image
from data.tiles.places import TilePlaces
from data.tiles.stream import Part

TILES_PER_BLOCK = 1000


class UnreadableTile(Exception):
    """A tile that can't be had; the message names it. ``next`` is the first tile number that may be sound again.

    It is the following tile where only this one is bad, and the first of the next file where the file is gone.
    """

    def __init__(self, message: str, next: int) -> None:
        super().__init__(message)
        self.next = next


class TileSource(ABC):
    """Tiles ``0 … len − 1``. ``parts`` says in which blocks the stream deals them out; ``digest`` identifies tiles and
    order."""

    parts: Sequence[Part]
    digest: str
    reads_slides: ClassVar[bool] = False
    """Whether a tile is read from its slide, which costs a core more than decoding it from a shard."""

    def __len__(self) -> int:
        return sum(int(part.block_sizes.sum()) for part in self.parts)

    @abstractmethod
    def name(self, number: int) -> str:
        """A tile's name for messages: its file and place."""

    def slide(self, number: int) -> str | None:
        """The slide that a tile is of, None where the source doesn't know. Neighbouring numbers are best of one
        slide."""
        return None

    def mpp(self, number: int, seed: int = 0, sample: int = 0) -> float | None:
        """At how many µm a pixel `read` gives it, None where the source doesn't know."""
        return None

    @abstractmethod
    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        """Tile ``number`` as uint8 ``(H, W, 3)``, from any thread. Raises UnreadableTile.

        What the source itself leaves to chance is drawn with the key ``(seed, sample)``; ``sample`` is the position in
        the run.
        """

    def decoded(self, number: int, image: bytes | memoryview) -> np.ndarray:
        """The pixels of tile ``number``, uint8 ``(H, W, 3)``, of its encoded ``image``. Raises UnreadableTile naming
        it."""
        try:
            return decode_image(image)
        except ValueError as error:
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})", number + 1) from error

    def places(self) -> Iterator[TilePlaces]:
        """Where its tiles lie on their slides, in the order of their numbers, some at a time. Raises Fault where that
        can't be told."""
        raise Fault(
            f"data.sample chooses tiles by slide and place, and {type(self).__name__} doesn't say where its tiles lie:"
            " leave data.sample out, or give the source a method places()."
        )

    def held_out(self) -> "TileSource | None":
        """Tiles that aren't among these, and that training is judged by; None where there are none."""
        return None

    def hold(self, blocks: int) -> None:  # noqa: B027  # a source on a disk has nothing to hold
        """Tiles of about so many blocks are going to be read by turns: keep what is open or fetched for that long."""

    def expect(self, numbers: np.ndarray) -> None:  # noqa: B027
        """These tiles are read soon: begin to fetch them."""


def cut_blocks(runs: np.ndarray, group: int = 1, most: int = TILES_PER_BLOCK) -> np.ndarray:
    """Cut runs of neighbouring tiles, ``(runs,)`` lengths, into blocks of at most ``most``: their sizes, int64.

    A run's blocks are equal to within a tile; with a ``group`` they are multiples of it instead, but for the run's
    last.
    """
    runs = np.asarray(runs, dtype=np.int64)
    unit = max(1, most // group) * group
    counts = -(-runs // (most if group == 1 else unit))
    run, count = np.repeat(runs, counts), np.repeat(counts, counts)
    place = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
    if group == 1:
        return (place + 1) * run // count - place * run // count
    return np.minimum((place + 1) * unit, run) - place * unit
