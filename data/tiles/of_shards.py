"""Tiles of one or several folders of shards, by number: bytes from an index and a range read, never a scan."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePath

import numpy as np

from data.fault import Fault
from data.remote import BlockCache, Truncated, read_range
from data.shards.index import ShardIndex
from data.shards.named_tars import open_shards
from data.shards.open_tars import OpenTars, without_header
from data.shards.tar_members import TAR_BLOCK
from data.slides.coordinates import UNKNOWN_PLACE
from data.tiles.numbering import Numbering
from data.tiles.places import TilePlaces
from data.tiles.source import TileSource, UnreadableTile, cut_blocks
from data.tiles.stream import Part

NUMBERED = re.compile(r"(^|[-_.])\d{4,}$")  # a tar's name that says which of many it is


class ShardTiles(TileSource):
    """The tiles of ``shards``, folders or URLs of folders, as one numbered sequence.

    A block is a stretch of one tar, at most a thousand tiles; with a ``group`` of several tiles (`Stream`'s
    ``slides_per_lane``) of one slide, too. On a disk a tile is one ``pread``; a remote tar is read a whole block at a
    time.
    """

    def __init__(self, group: int = 1, *, shards: list[str]) -> None:
        if not shards:
            raise Fault("data.shards is empty: give a folder of shards.")
        self.indices = open_shards(shards)
        self.numbering = Numbering(map(len, self.indices))
        sizes = np.concatenate([cut_blocks(_runs(index, group), group) for index in self.indices])
        self.parts = [Part(sizes, name=", ".join(map(str, shards)))]
        self.digest = "+".join(index.digest for index in self.indices)
        self._ends = np.cumsum(sizes)
        self._tars = OpenTars()
        self._fetched = BlockCache(_fetch)

    def locate(self, number: int) -> tuple[ShardIndex, int]:
        """The index that holds tile ``number``, and its row there."""
        which, row = self.numbering.locate(number)
        return self.indices[which], row

    def name(self, number: int) -> str:
        index, row = self.locate(number)
        file = index.file_of(row)
        if index.x[row] == UNKNOWN_PLACE:
            which = f"number {row - int(index.file_start[file]) + 1} (at byte {index.offset[row]})"
        else:
            which = f"{index.slide_of(row)} ({index.x[row]}, {index.y[row]})"
        return f"tile {which} in {index.place(file)}"

    def slide(self, number: int) -> str | None:
        index, row = self.locate(number)
        slide, tar = index.slide_of(row), PurePath(index.files[index.file_of(row)]).stem
        # Where nothing else says it a scan takes the tar's name, and one that is a number says nothing.
        return None if slide == tar and NUMBERED.search(tar) else f"{index.folder}/{slide}"

    def mpp(self, number: int, seed: int = 0, sample: int = 0) -> float | None:
        index, row = self.locate(number)
        return index.mpp_of(row)

    def places(self) -> Iterator[TilePlaces]:
        for index in self.indices:
            sides = np.array([float(side or 0) for side in index.meta["slides"]["tile_size_level0"]])
            for first, last in pairwise(index.file_start.tolist()):
                runs = np.searchsorted(index.run_start, np.arange(first, last), side="right") - 1
                x, y = (np.asarray(column[first:last], dtype=np.int64) for column in (index.x, index.y))
                yield TilePlaces(index.slides, np.asarray(index.run_slide)[runs], x, y, sides)

    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        """Tile ``number`` as uint8 ``(H, W, 3)``. Raises UnreadableTile naming it."""
        return self.decoded(number, self.jpeg(number, check=True))

    def jpeg(self, number: int, check: bool = False) -> memoryview:
        """Tile ``number`` as it lies in its shard, held to its header, and with ``check`` to its checksum (on a disk;
        what comes over a network was checked on its way). Raises UnreadableTile naming it."""
        index, row = self.locate(number)
        try:
            if index.remote:
                return without_header(self._from_block(number, index, row), index, row)
            return self._tars.jpeg(index, row, check)
        except (FileNotFoundError, Truncated) as error:
            following = number - row + _next_file(index, row)
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})", following) from error
        except (OSError, ValueError) as error:
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})", number + 1) from error

    def hold(self, blocks: int) -> None:
        self._fetched.capacity = 2 * blocks

    def expect(self, numbers: np.ndarray) -> None:
        """Fetch remote blocks ahead; the kernel looks ahead on a disk."""
        if any(index.remote for index in self.indices):
            for block in np.unique(np.searchsorted(self._ends, numbers, side="right")):
                first = int(self._ends[block - 1]) if block else 0
                index, row = self.locate(first)
                if index.remote:
                    self._fetched.announce(self._range(int(block), index, row))

    def _from_block(self, number: int, index: ShardIndex, row: int) -> bytes:
        block = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[block - 1]) if block else 0
        url, start, stop = self._range(block, index, row - (number - first))
        offset, length = int(index.offset[row]) - TAR_BLOCK - start, int(index.length[row]) + TAR_BLOCK
        data = self._fetched.get((url, start, stop))[offset : offset + length]
        if len(data) < length:
            raise Truncated(f"{url} is truncated")
        return data

    def _range(self, block: int, index: ShardIndex, row: int) -> tuple[str, int, int]:
        """URL and bytes of a block whose first tile is ``row`` of ``index``, that tile's header included."""
        last = row + int(self.parts[0].block_sizes[block]) - 1
        start, stop = int(index.offset[row]) - TAR_BLOCK, int(index.offset[last]) + int(index.length[last])
        return index.url(index.file_of(row)), start, stop


def _next_file(index: ShardIndex, row: int) -> int:
    """The row in the next tar that lies as far from its beginning: a lost tar's tiles are not all replaced by one."""
    file = index.file_of(row)
    following = (file + 1) % len(index.files)
    first, last = int(index.file_start[following]), int(index.file_start[following + 1])
    return first + (row - int(index.file_start[file])) % (last - first)


def _runs(index: ShardIndex, group: int) -> np.ndarray:
    """Tiles of each tar, in a row; where tiles are dealt out in groups, of each slide in each tar."""
    bounds = index.file_start if group == 1 else np.union1d(index.file_start, index.run_start)
    return np.diff(bounds)


def _fetch(place: tuple[str, int, int]) -> bytes:
    try:
        return read_range(*place)
    except Truncated as error:
        return error.data  # the tiles before the end are sound
