"""Tiles of Parquet files, by number: the images that others publish, read where they lie.

Row groups that lie side by side are read together, as much as holds about 250 tiles, and kept while their tiles come; a
block of the stream is one such chunk, so that each is read once a pass. Nothing else is kept, in memory or on a disk.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data.fault import Fault
from data.keyed import place_of_name
from data.npz_files import let_go
from data.parquet.index import UNREADABLE, ParquetIndex
from data.parquet.row_groups import read_footer, read_images, read_numbers
from data.recently_made import RecentlyMade
from data.remote import BlockCache
from data.slides.coordinates import UNKNOWN_PLACE
from data.slides.names import safe_ids
from data.tiles.numbering import Numbering
from data.tiles.places import TilePlaces
from data.tiles.source import TileSource, UnreadableTile, cut_blocks
from data.tiles.stream import Part

TILES_PER_CHUNK = 250
FOOTERS = 64  # of files, kept
CHUNKS_COUNTED = 10_000  # at once
MOST_HELD = 2 << 30  # bytes of images of a process
PLACE_COLUMNS = ("x", "y", "tile_size_level0")


class ParquetTiles(TileSource):
    """The tiles of an index, or those ``of`` the patients that are held out, or of all others.

    ``hold_out`` is the share of patients (of slides, where those aren't known) whose tiles aren't trained on: whose it
    is a hash of the name tells, so that it is the same whatever else there is. Raises Fault where nothing is known to
    tell by, or what is known contradicts itself.
    """

    def __init__(self, index: ParquetIndex, group: int = 1, hold_out: float = 0.0, held_out: bool = False) -> None:
        self.index, self.hold_out, self._is_held_out = index, hold_out, held_out
        if hold_out and not index.slides:
            raise Fault(
                f"data.hold_out={hold_out:g} holds out patients or slides, and these files don't say whose tiles they"
                " hold: name a column by data.slide=…"
            )
        if hold_out and index.unclear:
            raise Fault(f"data.hold_out={hold_out:g} can't tell whose tiles to hold out: {index.unclear}.")
        self._first_group = _chunk_starts(index)  # (chunks + 1,)
        row_starts = np.concatenate([[0], np.cumsum(index.group_rows)])
        self._first_row = row_starts[self._first_group]  # (chunks + 1,)
        self._wanted = self._chosen()  # (slides,) bool, None: all
        self.numbering = Numbering(self._counts().tolist())
        self.parts = [Part(self._blocks(group), name="the Parquet files")]
        if not len(self):
            raise Fault(
                f"data.hold_out={hold_out:g} {'holds none' if held_out else 'holds all'} of these {len(index.slides)}"
                " slides out: choose another share."
            )
        self.digest = hashlib.blake2b(f"{index.digest} {hold_out:g} {held_out}".encode(), digest_size=8).hexdigest()
        self._footers = RecentlyMade(read_footer, FOOTERS)
        self._chunks = BlockCache(self._read_chunk)

    def held_out(self) -> "ParquetTiles | None":
        return ParquetTiles(self.index, 1, self.hold_out, held_out=True) if self.hold_out else None

    def name(self, number: int) -> str:
        chunk, own = self.numbering.locate(number)
        file, _ = self._file_of(chunk)
        row = int(self._first_row[chunk]) + self._row(chunk, own)
        begin = int(np.searchsorted(self._first_group, self.index.file_groups[file], side="left"))
        return f"row {row - int(self._first_row[begin])} of {self.index.files[file]}"

    def slide(self, number: int) -> str | None:
        if not self.index.slides:
            return None
        chunk, own = self.numbering.locate(number)
        return self.index.slides[self.index.slide[int(self._first_row[chunk]) + self._row(chunk, own)]]

    def places(self) -> Iterator[TilePlaces]:
        if not self.index.slides:
            raise Fault(
                "data.sample chooses tiles by slide and place, and these files don't say whose tiles they hold: name a"
                " column by data.slide=…"
            )
        slides = safe_ids(self.index.slides)
        for chunk in range(len(self._first_row) - 1):
            file, group = self._file_of(chunk)
            count = int(self._first_group[chunk + 1] - self._first_group[chunk])
            name = self.index.files[file]
            try:
                found = read_numbers(name, self._footers.get(name), range(group, group + count), PLACE_COLUMNS)
            except UNREADABLE as error:
                raise Fault(f"where the tiles of {name} lie can't be read ({' '.join(str(error).split())}).") from error
            if lacking := [column for column in PLACE_COLUMNS[:2] if column not in found]:
                raise Fault(
                    f"data.sample chooses tiles by slide and place, and {name} has no column {' and no '.join(lacking)}:"
                    " add them, level-0 pixels of a tile's top-left corner, or leave data.sample out."
                )
            rows = slice(None) if self._wanted is None else self._rows_of(chunk)
            first, last = self._first_row[chunk : chunk + 2]
            own, slide = np.unique(self.index.slide[first:last][rows], return_inverse=True)
            x, y = (np.nan_to_num(found[name][rows], nan=UNKNOWN_PLACE).astype(np.int64) for name in PLACE_COLUMNS[:2])
            sides = np.zeros(len(own))
            if PLACE_COLUMNS[2] in found:
                sides[slide] = np.nan_to_num(found[PLACE_COLUMNS[2]][rows])
            yield TilePlaces([slides[number] for number in own], slide, x, y, sides)

    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        """Tile ``number`` as uint8 ``(H, W, 3)``. Raises UnreadableTile naming it."""
        return self.decoded(number, self.encoded(number))

    def encoded(self, number: int) -> memoryview:
        """Tile ``number`` as it lies in its file. Raises UnreadableTile naming it."""
        chunk, own = self.numbering.locate(number)
        try:
            image = self._chunks.get(chunk)[self._row(chunk, own)]
        except UNREADABLE as error:  # the tile as far into the next chunk
            following = (chunk + 1) % len(self._first_row[1:])
            count = int(self.numbering.starts[following + 1] - self.numbering.starts[following])
            tile = self.numbering.number(following, own % max(count, 1))
            raise UnreadableTile(f"{self.name(number)} can't be read ({' '.join(str(error).split())})", tile) from error
        if not image.is_valid:
            raise UnreadableTile(f"{self.name(number)} holds no image", number + 1)
        return memoryview(image.as_buffer()).cast("B")

    def hold(self, blocks: int) -> None:
        self._chunks.capacity = 2 * blocks
        held = 2 * blocks * float(self.index.group_bytes.sum()) / (len(self._first_row) - 1)
        if held > MOST_HELD and len(self._first_row) - 1 > blocks:
            raise Fault(
                f"so many blocks as a process mixes would take {held / 2**30:.1f} GiB of memory, since what is read"
                f" together in these files is {self.index.group_bytes.max() / 2**20:.0f} MiB large: set data.window or"
                " data.lanes lower, or write the files with smaller row groups."
            )

    def expect(self, numbers: np.ndarray) -> None:
        for chunk in np.unique(np.searchsorted(self.numbering.starts, numbers, side="right") - 1).tolist():
            self._chunks.announce(chunk)

    def _read_chunk(self, chunk: int) -> pa.Array:
        file, group = self._file_of(chunk)
        count = int(self._first_group[chunk + 1] - self._first_group[chunk])
        name = self.index.files[file]
        let_go(self.index.slide)  # or a long run would have looked at all of it
        return read_images(name, self._footers.get(name), range(group, group + count), self.index.image)

    def _file_of(self, chunk: int) -> tuple[int, int]:
        """A chunk's file, and its first row group there."""
        group = int(self._first_group[chunk])
        file = int(np.searchsorted(self.index.file_groups, group, side="right")) - 1
        return file, group - int(self.index.file_groups[file])

    def _row(self, chunk: int, own: int) -> int:
        """The row in its chunk of the chunk's tile ``own``."""
        return own if self._wanted is None else int(self._rows_of(chunk)[own])

    def _rows_of(self, chunk: int) -> np.ndarray:
        """The rows of a chunk that are wanted."""
        assert self._wanted is not None
        first, last = self._first_row[chunk : chunk + 2]
        return np.flatnonzero(self._wanted[self.index.slide[first:last]])

    def _chosen(self) -> np.ndarray | None:
        if not self.hold_out:
            return None
        whose = [patient or slide for slide, patient in zip(self.index.slides, self.index.patients, strict=True)]
        out = np.array([place_of_name(name) < self.hold_out for name in whose])
        return out if self._is_held_out else ~out

    def _counts(self) -> np.ndarray:
        """Wanted tiles of each chunk."""
        if self._wanted is None:
            return np.diff(self._first_row)
        counts, starts = [], self._first_row
        for chunk in range(0, len(starts) - 1, CHUNKS_COUNTED):
            first = starts[chunk : chunk + CHUNKS_COUNTED + 1]
            wanted = self._wanted[self.index.slide[first[0] : first[-1]]]
            counts.append(np.add.reduceat(wanted, first[:-1] - first[0], dtype=np.int64))
            let_go(self.index.slide)
        return np.concatenate(counts)

    def _blocks(self, group: int) -> np.ndarray:
        counts = np.diff(self.numbering.starts)
        if group == 1:
            return counts[counts > 0]
        runs = np.concatenate([self._runs(chunk) for chunk in range(len(counts))]) if self.index.slides else counts[:0]
        if not len(runs) or runs.mean() < group:
            raise Fault(
                f"data.slides_per_lane deals out {group} tiles of one slide together, and in these files tiles of one"
                " slide don't lie side by side: leave it null."
            )
        return cut_blocks(runs, group)

    def _runs(self, chunk: int) -> np.ndarray:
        """Lengths of the runs of one slide among a chunk's wanted tiles."""
        first, last = self._first_row[chunk : chunk + 2]
        slides = self.index.slide[first:last]
        slides = slides if self._wanted is None else slides[self._wanted[slides]]
        bounds = np.flatnonzero(np.diff(slides)) + 1
        return np.diff([0, *bounds.tolist(), len(slides)]) if len(slides) else bounds


def _chunk_starts(index: ParquetIndex) -> np.ndarray:
    """The row groups at which chunks begin, and the whole ends: neighbours of a file, as many as hold about so many
    rows."""
    starts = []
    for first, last in zip(index.file_groups[:-1].tolist(), index.file_groups[1:].tolist(), strict=True):
        filled = np.flatnonzero(index.group_rows[first:last])  # groups without rows begin no chunk
        rows = np.cumsum(index.group_rows[first:last])[filled]
        parts = (rows - 1) // TILES_PER_CHUNK  # which share of the file a group ends in
        filled[0] = 0  # but in a file's first chunk they may come first
        starts.append(first + filled[np.flatnonzero(np.diff(parts, prepend=-1))])
    return np.concatenate([*starts, index.file_groups[-1:]])
