"""The bytes of many tiles of a folder of shards at once, in any order, without decoding them."""

import os

import numpy as np

from data.shard_index import ShardIndex, read_jpeg


class RawTiles:
    """Open tars of an index. Use as a context manager; ``read`` may be called from several threads."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._open: dict[int, int] = {}

    def __enter__(self) -> "RawTiles":
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, rows: np.ndarray) -> list[bytes]:
        """The JPEGs of ``rows`` (n,) int64 of the index, in that order. Raises Fault where a tar ends before a tile does."""
        files = np.searchsorted(self.index.file_start, rows, side="right") - 1
        descriptors = {file: self._descriptor(file) for file in np.unique(files).tolist()}
        places = zip(
            [descriptors[file] for file in files.tolist()],
            self.index.length[rows].tolist(),
            self.index.offset[rows].tolist(),
            strict=True,
        )
        return [
            data
            if len(data := os.pread(descriptor, length, offset)) == length
            else read_jpeg(descriptor, offset, length)
            for descriptor, length, offset in places
        ]

    def _descriptor(self, file: int) -> int:
        found = self._open.get(file)
        if found is None:
            descriptor = os.open(self.index.path(file), os.O_RDONLY)
            found = self._open.setdefault(file, descriptor)
            if found != descriptor:  # another thread was faster
                os.close(descriptor)
        return found
