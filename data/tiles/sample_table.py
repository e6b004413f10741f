"""A table of the tiles that are trained on, and how often each: what `pretrain curate` writes, or anybody else.

    slide              the slide's id, as a store of embeddings, an index of shards or a survey has it
    x, y               the tile's top-left corner, level-0 pixels
    weight             times that the tile comes in a pass, 0: never; where there is no such column, once
    tile_size_level0   a tile's side, level-0 pixels; may be left out

It is Parquet and read slide by slide: rows of one slide lie best together, in any order. What is kept in memory is where
each slide's rows are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.fault import Fault
from data.recently_made import RecentlyMade
from data.slides.coordinates import FARTHEST
from data.tiles.places import place_keys

NEEDED = ("slide", "x", "y")
WEIGHT, SIDE_LEVEL0 = "weight", "tile_size_level0"
ROWS_AT_ONCE = 65_536
GROUPS_KEPT = 4
UNREADABLE_TABLE = (pa.ArrowException, OSError, ValueError)  # the last of text that is none
MOST_WEIGHT = 1000  # a larger one is a mistake
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class SampleOfSlide:
    """A slide's rows of the table, in row-major order: ``keys`` of their places, how often each comes, and a tile's
    side in level-0 pixels, 0 where the table doesn't say."""

    keys: np.ndarray  # (n,) int64, ascending
    weights: np.ndarray  # (n,) int64
    side: float


class SampleTable:
    """The table in a Parquet file. Raises Fault where it can't be read, or isn't one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.footer = pq.read_metadata(path)
            self.columns = self.footer.schema.to_arrow_schema().names
        except FileNotFoundError as error:
            raise Fault(f"there is no table of tiles at {path}: 'pretrain curate' makes one.") from error
        except UNREADABLE_TABLE as error:
            raise self._unreadable(error) from error
        if lacking := [name for name in NEEDED if name not in self.columns]:
            raise Fault(
                f"{path} has no column {' and no '.join(lacking)} (it has {', '.join(self.columns)}): a table of tiles"
                " says slide, x and y of each, and weight, as what 'pretrain curate' writes."
            )
        counts = [self.footer.row_group(group).num_rows for group in range(self.footer.num_row_groups)]
        self._starts = np.cumsum([0, *counts])
        self._groups = RecentlyMade(self._read_group, GROUPS_KEPT)
        self._runs: dict[str, list[tuple[int, int]]] = {}
        self.chosen = 0  # rows that come at all
        self._look_through()
        if not self.chosen:
            raise Fault(f"{path} chooses none of its {len(self):,} tiles: give a table with a weight above 0.")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def slides(self) -> list[str]:
        """The slides that have rows."""
        return list(self._runs)

    def of(self, slide: str) -> SampleOfSlide | None:
        """The rows of a slide, None where there are none. Raises Fault where they contradict each other."""
        if slide not in self._runs:
            return None
        parts = [part for first, last in self._runs[slide] for part in self._rows(first, last)]
        x, y, weights, sides = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= FARTHEST:
            raise Fault(f"{self.path}: places of {slide} lie outside of any slide; x and y are level-0 pixels.")
        keys = place_keys(x, y)
        order = np.argsort(keys, kind="stable")
        if len(twice := np.flatnonzero(np.diff(keys[order]) == 0)):
            row, such = order[twice[0]], len(np.unique(keys[order[twice]]))
            raise Fault(
                f"{self.path} has the tile of {slide} at ({x[row]}, {y[row]}) more than once ({such:,} such of this slide):"
                " leave one row of each tile, of all slides."
            )
        if len(np.unique(sides)) > 1:
            raise Fault(
                f"{self.path} has tiles of {slide} of several sizes: make a table of each size, and give each to a"
                " member of data=mixture as its sample."
            )
        return SampleOfSlide(keys[order], weights[order], float(sides[0]))

    def _look_through(self) -> None:
        """Find where each slide's rows are, and how many are chosen. Raises Fault for values that can't be."""
        columns = [NEEDED[0], *([WEIGHT] if WEIGHT in self.columns else [])]
        first = 0
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as opened:
                for batch in opened.iter_batches(ROWS_AT_ONCE, columns=columns):
                    slides = batch.column(0)
                    if slides.null_count:
                        raise Fault(f"{self.path} doesn't say the slide of every tile: fill them in.")
                    self._note_runs(first, pc.dictionary_encode(pc.cast(slides, pa.string())))
                    self.chosen += int((self._weights(batch) > 0).sum())
                    first += len(batch)
            if first != len(self):
                raise ValueError(f"{first} rows, where {len(self)} were said")
        except UNREADABLE_TABLE as error:
            raise self._unreadable(error) from error

    def _note_runs(self, first: int, slides: pa.DictionaryArray) -> None:
        codes, names = np.asarray(slides.indices), slides.dictionary.to_pylist()
        bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)] if len(codes) else []
        for begin, end in pairwise(bounds):
            runs = self._runs.setdefault(names[codes[begin]], [])
            if runs and runs[-1][1] == first + begin:  # it goes on from the batch before
                runs[-1] = (runs[-1][0], first + end)
            else:
                runs.append((first + begin, first + end))

    def _rows(self, first: int, last: int) -> Iterator[Columns]:
        """``x, y, weight, side`` of the rows ``first … last − 1``."""
        group = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < last:
            start, end = (int(place) for place in self._starts[group : group + 2])
            x, y, weights, sides = (column[first - start : last - start] for column in self._groups.get(group))
            yield x, y, weights, sides
            first, group = end, group + 1

    def _read_group(self, group: int) -> Columns:
        wanted = [name for name in (*NEEDED[1:], WEIGHT, SIDE_LEVEL0) if name in self.columns]
        try:
            with pq.ParquetFile(self.path, metadata=self.footer, page_checksum_verification=True) as opened:
                table = opened.read_row_group(group, columns=wanted)
            if len(table) != self._starts[group + 1] - self._starts[group]:
                raise ValueError(f"{len(table)} rows of row group {group}")
        except UNREADABLE_TABLE as error:
            raise self._unreadable(error) from error
        sides = table.column(SIDE_LEVEL0) if SIDE_LEVEL0 in wanted else pa.nulls(len(table), pa.float64())
        return (
            self._whole(table.column("x"), "x"),
            self._whole(table.column("y"), "y"),
            self._weights(table),
            np.asarray(pc.fill_null(pc.cast(sides, pa.float64()), 0.0)),
        )

    def _weights(self, rows: pa.RecordBatch | pa.Table) -> np.ndarray:
        if WEIGHT not in self.columns:
            return np.ones(len(rows), dtype=np.int64)
        weights = self._whole(rows.column(WEIGHT), WEIGHT)
        if weights.size and (weights.min() < 0 or weights.max() > MOST_WEIGHT):
            raise Fault(
                f"{self.path} has weights of {weights.min()} to {weights.max()}: a weight is how often a tile comes in a"
                f" pass, from 0 to {MOST_WEIGHT}."
            )
        return weights

    def _whole(self, column: pa.Array | pa.ChunkedArray, name: str) -> np.ndarray:
        """A column as int64. Raises Fault where its values aren't whole numbers."""
        if column.null_count:
            raise Fault(f"{self.path} has tiles without {name}: fill them in, or leave them out.")
        try:
            return np.asarray(pc.cast(column, pa.int64()))
        except pa.ArrowException as error:
            raise Fault(
                f"the column {name} of {self.path} holds what is no whole number ({' '.join(str(error).split())})."
            ) from error

    def _unreadable(self, error: Exception) -> Fault:
        return Fault(
            f"{self.path} can't be read as a table of tiles ({' '.join(str(error).split())}): give the Parquet file that"
            " 'pretrain curate' wrote, or have it written again."
        )
