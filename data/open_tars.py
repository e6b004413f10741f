"""The JPEGs of local shards as they lie in their tars: each tar opened once, a tile one read, held to the header in front of it."""

import os
import threading

from data.shard_index import ShardIndex, read_jpeg
from data.tar_members import BLOCK, is_header_of

MOST_OPEN = 256  # tars of a process


class OpenTars:
    """Tars that stay open, the `MOST_OPEN` that were opened last; for any number of threads. A copy for another process opens its own."""

    def __init__(self) -> None:
        self._open: dict[tuple[ShardIndex, int], _Tar] = {}
        self._lock = threading.Lock()

    def jpeg(self, index: ShardIndex, row: int) -> memoryview:
        """The JPEG of a row of an index. Raises OSError where its tar can't be read, Truncated where that ends before, and ValueError
        where there is something else (`without_header`)."""
        tar = self._tar(index, index.file_of(row))
        data = read_jpeg(tar.descriptor, int(index.offset[row]) - BLOCK, int(index.length[row]) + BLOCK)
        return without_header(data, index, row)

    def _tar(self, index: ShardIndex, file: int) -> "_Tar":
        tar = self._open.get((index, file))
        if tar is None:
            with self._lock:
                tar = self._open.get((index, file))
                if tar is None:
                    tar = self._open[index, file] = _Tar(index, file)
                while len(self._open) > MOST_OPEN:
                    self._open.pop(next(iter(self._open)))  # closed once the last thread is through with it
        return tar

    def __len__(self) -> int:
        return len(self._open)

    def __reduce__(self) -> tuple[type["OpenTars"], tuple[()]]:
        return OpenTars, ()


class _Tar:
    """An open tar, closed with the last reference to it."""

    def __init__(self, index: ShardIndex, file: int) -> None:
        self.descriptor = -1
        self.descriptor = os.open(index.path(file), os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def without_header(data: bytes, index: ShardIndex, row: int) -> memoryview:
    """The JPEG of a row, of ``data`` that is its member's header and itself. Raises ValueError where the header is another's.

    A tar that is no longer the one that was indexed must not pass other tiles off as those in the index. (In tars of other
    programs, whose names are their own, the length must agree.)
    """
    name = None if "made_by" in index.meta else f"{index.slide_of(row)}_{index.x[row]}_{index.y[row]}.jpg"
    if not is_header_of(data[:BLOCK], name, int(index.length[row])):
        raise ValueError("the shard holds something else there: its index is of another file")
    return memoryview(data)[BLOCK:]
