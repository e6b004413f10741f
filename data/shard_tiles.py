"""Tiles of one or several folders of shards, by number: bytes from an index and a pread, never a scan."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from data.fault import Fault
from data.shard_index import ShardIndex, read_jpeg
from data.tar_members import BLOCK, is_header_of

TILES_PER_BLOCK = 1000


class UnreadableTile(Exception):
    """A tile whose bytes are gone or are no JPEG; the message names it."""


class ShardTiles:
    """The tiles of ``folders`` as one numbered sequence ``0 … len − 1``, read at random from any thread.

    ``block_sizes`` (blocks,) int64 are the runs of neighbouring tiles that `data.stream.Stream` deals out: at most a
    thousand tiles each, never across two tars. ``digest`` identifies the tiles and their order.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.indices = [ShardIndex.open(folder) for folder in folders]
        self.starts = np.cumsum([0, *(len(index) for index in self.indices)])
        self.block_sizes = np.concatenate([_blocks(np.diff(index.file_start)) for index in self.indices])
        self.digest = "+".join(index.digest for index in self.indices)
        self._open: dict[Path, int] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, number: int) -> tuple[ShardIndex, int]:
        """The index that holds tile ``number``, and its row there."""
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.indices[which], int(number - self.starts[which])

    def name(self, number: int) -> str:
        """A tile's name for messages: tar, slide and place."""
        index, row = self.locate(number)
        return f"tile {self._slide(index, row)} ({index.x[row]}, {index.y[row]}) in {self._tar(index, row)}"

    def read(self, number: int) -> np.ndarray:
        """Tile ``number`` as uint8 ``(H, W, 3)``. Raises UnreadableTile naming it.

        The member's header is read with it and must be this tile's: a tar that is no longer the one that was indexed must not
        pass other tiles off as those in the index. (In tars of other programs, whose names are their own, the length must agree.)
        """
        index, row = self.locate(number)
        offset, length = int(index.offset[row]), int(index.length[row])
        try:
            data = read_jpeg(self._descriptor(self._tar(index, row)), offset - BLOCK, length + BLOCK)
            own = "made_by" not in index.meta
            if not is_header_of(data[:BLOCK], self._member(index, row) if own else None, length):
                raise ValueError("the shard holds something else there: its index is of another file")
            return simplejpeg.decode_jpeg(memoryview(data)[BLOCK:], colorspace="RGB")
        except (ValueError, OSError, Fault) as error:
            raise UnreadableTile(f"{self.name(number)} can't be read ({error})") from error

    @staticmethod
    def _slide(index: ShardIndex, row: int) -> str:
        return index.slides[index.run_slide[int(np.searchsorted(index.run_start, row, side="right")) - 1]]

    def _member(self, index: ShardIndex, row: int) -> str:
        return f"{self._slide(index, row)}_{index.x[row]}_{index.y[row]}.jpg"

    @staticmethod
    def _tar(index: ShardIndex, row: int) -> Path:
        return index.path(int(np.searchsorted(index.file_start, row, side="right")) - 1)

    def _descriptor(self, tar: Path) -> int:
        if tar not in self._open:
            # Two threads may open it twice; the one that loses closes its own, and preads never share a position.
            descriptor = os.open(tar, os.O_RDONLY)
            if self._open.setdefault(tar, descriptor) != descriptor:
                os.close(descriptor)
        return self._open[tar]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


def _blocks(tiles_per_file: np.ndarray) -> np.ndarray:
    """Cut each file's tiles into equal runs of at most `TILES_PER_BLOCK`."""
    sizes = []
    for tiles in tiles_per_file.tolist():
        count = max(1, -(-tiles // TILES_PER_BLOCK))
        sizes.append(np.diff(np.arange(count + 1) * tiles // count))
    return np.concatenate(sizes)
