"""The JPEGs of shards as they lie in their tars: each tar opened once, a tile one read, held to its header and its
checksum.

Of shards behind a URL each tile is a request: for looking at some, or at one slide after another; training reads whole
blocks (`ShardTiles`).
"""

import os
import zlib

import numpy as np

from data import open_files
from data.recently_made import RecentlyMade
from data.remote import read_range
from data.shards.index import ShardIndex, read_jpeg
from data.shards.records import recorded_checksums
from data.shards.tar_members import TAR_BLOCK, is_header_of


class OpenTars:
    """Tars that stay open, those that were opened last, as many as `open_files.share` allows; for any number of
    threads.

    A copy for another process opens its own.
    """

    def __init__(self) -> None:
        self._open = RecentlyMade(_Tar, open_files.FEWEST_OPEN)

    def jpeg(self, index: ShardIndex, row: int, check: bool = True) -> memoryview:
        """The JPEG of a row of an index. Raises OSError where its tar can't be read, Truncated where that ends before,
        and ValueError where there is something else (`without_header`), or other bytes than were recorded with the
        shard: of flipped bits four in five leave a JPEG that can be decoded, to another picture."""
        file = index.file_of(row)
        start, length = int(index.offset[row]) - TAR_BLOCK, int(index.length[row]) + TAR_BLOCK
        if index.remote:  # what comes over a network is checked on its way
            return without_header(read_range(index.url(file), start, start + length), index, row)
        tar = self._tar(index, file)
        data = read_jpeg(tar.descriptor, start, length)
        jpeg = without_header(data, index, row)
        if check:
            recorded = tar.checksums(index, file)
            if recorded is not None and zlib.crc32(jpeg) != recorded[row - index.file_start[file]]:
                raise ValueError("its bytes have changed since the shard was recorded")
        return jpeg

    def _tar(self, index: ShardIndex, file: int) -> "_Tar":
        if (index, file) not in self._open:
            self._open.capacity = open_files.share_of_open_files(self)
        return self._open.get((index, file))

    def __len__(self) -> int:
        return len(self._open)


class _Tar:
    """An open tar, closed with the last reference to it."""

    def __init__(self, place: tuple[ShardIndex, int]) -> None:
        index, file = place
        self.descriptor = -1
        self.descriptor = os.open(index.path(file), os.O_RDONLY)
        self._checksums: list[np.ndarray | None] = []

    def checksums(self, index: ShardIndex, file: int) -> np.ndarray | None:
        """See `recorded_checksums`; read when the first tile is."""
        if not self._checksums:
            self._checksums.append(recorded_checksums(index, file))
        return self._checksums[0]

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def without_header(data: bytes, index: ShardIndex, row: int) -> memoryview:
    """The JPEG of a row, of ``data`` that is its member's header and itself. Raises ValueError where the header is
    another's.

    A tar that is no longer the one that was indexed must not pass other tiles off as those in the index. (In tars of
    other programs, whose names are their own, the length must agree.)
    """
    name = None if "made_by" in index.meta else f"{index.slide_of(row)}_{index.x[row]}_{index.y[row]}.jpg"
    if not is_header_of(data[:TAR_BLOCK], name, int(index.length[row])):
        raise ValueError("the shard holds something else there: its index is of another file")
    return memoryview(data)[TAR_BLOCK:]
