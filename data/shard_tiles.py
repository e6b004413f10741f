"""Tiles of one or several folders of shards, by number: bytes from an index and a range read, never a scan."""

import os
import threading
from pathlib import Path

import numpy as np
import simplejpeg

from data.remote import BlockCache, Truncated, read_range
from data.shard_index import ShardIndex, read_jpeg
from data.stream import Part
from data.tar_members import BLOCK, is_header_of
from data.tile_source import TileSource, UnreadableTile, cut_blocks

MOST_OPEN = 256  # tars of a process


class ShardTiles(TileSource):
    """The tiles of ``shards``, folders or URLs of folders, as one numbered sequence.

    A block is a stretch of one tar, at most a thousand tiles; with a ``group`` of several tiles (`Stream`'s ``slides_per_lane``) of
    one slide, too. On a disk a tile is one ``pread``; a remote tar is read a whole block at a time.
    """

    def __init__(self, group: int = 1, *, shards: list[str]) -> None:
        self.indices = [ShardIndex.open(folder) for folder in shards]
        self.starts = np.cumsum([0, *(len(index) for index in self.indices)])
        sizes = np.concatenate([cut_blocks(_runs(index, group), group) for index in self.indices])
        self.parts = [Part(sizes, name=", ".join(map(str, shards)))]
        self.digest = "+".join(index.digest for index in self.indices)
        self._ends = np.cumsum(sizes)
        self._tars: dict[Path, _Tar] = {}
        self._lock = threading.Lock()
        self._fetched = BlockCache(_fetch)

    def locate(self, number: int) -> tuple[ShardIndex, int]:
        """The index that holds tile ``number``, and its row there."""
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.indices[which], int(number - self.starts[which])

    def name(self, number: int) -> str:
        index, row = self.locate(number)
        file = _file(index, row)
        tar = index.url(file) if index.remote else index.path(file)
        return f"tile {_slide(index, row)} ({index.x[row]}, {index.y[row]}) in {tar}"

    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        """Tile ``number`` as uint8 ``(H, W, 3)``. Raises UnreadableTile naming it.

        The member's header is read with it and must be this tile's: a tar that is no longer the one that was indexed must not
        pass other tiles off as those in the index. (In tars of other programs, whose names are their own, the length must agree.)
        """
        index, row = self.locate(number)
        offset, length = int(index.offset[row]), int(index.length[row])
        try:
            if index.remote:
                data = self._from_block(number, index, row)
            else:
                data = read_jpeg(self._tar(index.path(_file(index, row))).descriptor, offset - BLOCK, length + BLOCK)
        except (FileNotFoundError, Truncated) as error:
            following = number - row + _next_file(index, row)
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})", following) from error
        except OSError as error:
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})", number + 1) from error
        own = "made_by" not in index.meta
        try:
            if not is_header_of(data[:BLOCK], _member(index, row) if own else None, length):
                raise ValueError("the shard holds something else there: its index is of another file")
            return simplejpeg.decode_jpeg(memoryview(data)[BLOCK:], colorspace="RGB")
        except ValueError as error:
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
                    self._fetched.announce(*self._range(int(block), index, row))

    def _from_block(self, number: int, index: ShardIndex, row: int) -> bytes:
        block = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[block - 1]) if block else 0
        url, start, stop = self._range(block, index, row - (number - first))
        offset, length = int(index.offset[row]) - BLOCK - start, int(index.length[row]) + BLOCK
        data = self._fetched.get(url, start, stop)[offset : offset + length]
        if len(data) < length:
            raise Truncated(f"{url} is truncated")
        return data

    def _range(self, block: int, index: ShardIndex, row: int) -> tuple[str, int, int]:
        """URL and bytes of a block whose first tile is ``row`` of ``index``, that tile's header included."""
        last = row + int(self.parts[0].block_sizes[block]) - 1
        start, stop = int(index.offset[row]) - BLOCK, int(index.offset[last]) + int(index.length[last])
        return index.url(_file(index, row)), start, stop

    def _tar(self, path: Path) -> "_Tar":
        tar = self._tars.get(path)
        if tar is None:
            with self._lock:
                tar = self._tars.setdefault(path, _Tar(path))
                while len(self._tars) > MOST_OPEN:
                    self._tars.pop(next(iter(self._tars)))  # closed once the last thread is through with it
        return tar

    def __getstate__(self) -> dict[str, object]:
        left_behind: dict[str, object] = {"_tars": {}, "_lock": None, "_fetched": None}
        return {**self.__dict__, **left_behind}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock, self._fetched = threading.Lock(), BlockCache(_fetch)


class _Tar:
    """An open tar, closed with the last reference to it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _file(index: ShardIndex, row: int) -> int:
    return int(np.searchsorted(index.file_start, row, side="right")) - 1


def _slide(index: ShardIndex, row: int) -> str:
    return index.slides[index.run_slide[int(np.searchsorted(index.run_start, row, side="right")) - 1]]


def _member(index: ShardIndex, row: int) -> str:
    return f"{_slide(index, row)}_{index.x[row]}_{index.y[row]}.jpg"


def _next_file(index: ShardIndex, row: int) -> int:
    """The row in the next tar that lies as far from its beginning: a lost tar's tiles are not all replaced by one."""
    file = _file(index, row)
    following = (file + 1) % len(index.files)
    first, last = int(index.file_start[following]), int(index.file_start[following + 1])
    return first + (row - int(index.file_start[file])) % (last - first)


def _runs(index: ShardIndex, group: int) -> np.ndarray:
    """Tiles of each tar, in a row; where tiles are dealt out in groups, of each slide in each tar."""
    bounds = index.file_start if group == 1 else np.union1d(index.file_start, index.run_start)
    return np.diff(bounds)


def _fetch(url: str, start: int, stop: int) -> bytes:
    try:
        return read_range(url, start, stop)
    except Truncated as error:
        return error.data  # the tiles before the end are sound
