"""Encoded images out of Parquet files: a few neighbouring row groups at a time, by ranges of their image column alone."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.images import is_encoded
from data.remote import RemotePath, Truncated, is_remote, read_range
from data.seekable import SeekableFile

GAP = 1 << 20  # bytes of other columns between two row groups that are read along, since another read costs more
ROWS_PEEKED, PEEKED = 16, 1 << 20  # and bytes at once, where it is asked what columns hold
FOOTER_END = 8  # bytes behind the footer: its length, and "PAR1"


def read_footer(file: str) -> pq.FileMetaData:
    """What a Parquet file says of itself at its end. Raises OSError or pyarrow's errors where it can't be read."""
    if not is_remote(file):
        return pq.read_metadata(file)
    with RemotePath(file).open() as raw:
        return pq.read_metadata(raw)


def column_place(footer: pq.FileMetaData, group: int, column: str) -> tuple[int, int]:
    """First byte, and the one behind the last, of a row group's ``column`` (dotted where it lies in a struct). Raises
    OSError for a damaged footer, which has none."""
    of_group = footer.row_group(group)
    for number in range(of_group.num_columns):
        chunk = of_group.column(number)
        if chunk.path_in_schema == column:
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
                start = min(start, chunk.dictionary_page_offset)
            return start, start + chunk.total_compressed_size
    raise OSError(f"its row group {group} has no column {column}")


def read_raw_footer(file: str, footer: pq.FileMetaData, size: int) -> bytes:
    """The bytes of the footer of a file of ``size`` bytes. Raises as `read_footer` does, and Fault."""
    return _read(file, size - FOOTER_END - footer.serialized_size, size - FOOTER_END)


def read_images(file: str, footer: pq.FileMetaData, groups: Sequence[int], column: str) -> pa.Array:
    """The encoded images of neighbouring row groups, in their order; null where a row has none. Raises Fault, OSError
    or pyarrow's errors where they can't be read."""
    groups = [group for group in groups if footer.row_group(group).num_rows]  # the pages of the others may lie anywhere
    ranges: list[list[int]] = []
    for start, stop in (column_place(footer, group, column) for group in groups):
        if ranges and 0 <= start - ranges[-1][1] <= GAP:
            ranges[-1][1] = stop
        else:
            ranges.append([start, stop])
    parts = [(start, _read(file, start, stop)) for start, stop in ranges]
    source = pa.PythonFile(_Parts(parts), "r")
    with pq.ParquetFile(source, metadata=footer, page_checksum_verification=True) as opened:
        table = opened.read_row_groups(groups, columns=[column], use_threads=False)
    images = table.column(0).combine_chunks()
    return pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images


def read_numbers(
    file: str, footer: pq.FileMetaData, groups: Sequence[int], columns: Sequence[str]
) -> dict[str, np.ndarray]:
    """Columns of numbers of some row groups, those that there are: float64, NaN where a row has none. Raises OSError or
    pyarrow's errors where they can't be read, or aren't numbers."""
    there = [name for name in columns if name in footer.schema.to_arrow_schema().names]
    source = RemotePath(file).open() if is_remote(file) else file
    with pq.ParquetFile(source, metadata=footer, page_checksum_verification=True) as opened:
        table = opened.read_row_groups(groups, columns=there, use_threads=False)
    return {name: np.asarray(pc.fill_null(pc.cast(table.column(name), pa.float64()), np.nan)) for name in there}


def _read(file: str, start: int, stop: int) -> bytes:
    if is_remote(file):
        return read_range(file, start, stop)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        parts = []
        while start < stop and (data := os.pread(descriptor, stop - start, start)):
            parts.append(data)
            start += len(data)
    finally:
        os.close(descriptor)
    if start < stop:
        raise Truncated(f"{file} ends {stop - start} bytes before its row group does: it is truncated")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def columns_of_images(file: str, names: list[str]) -> list[str]:
    """Those of several columns of bytes whose first value is an encoded image; none where that can't be read."""
    source = RemotePath(file).open() if is_remote(file) else file
    try:
        with pq.ParquetFile(source, buffer_size=PEEKED) as opened:
            batch = next(opened.iter_batches(ROWS_PEEKED, columns=names), pa.RecordBatch.from_pylist([]))
            first = pa.Table.from_batches([batch]).flatten()
            values = {name: first.column(name).drop_null() for name in names if name in first.column_names}
    except (OSError, pa.ArrowException):
        return []
    return [name for name, some in values.items() if len(some) and is_encoded(some[0].as_py())]


class _Parts(SeekableFile):
    """A file of which some ranges are there, as pyarrow reads it."""

    def __init__(self, parts: list[tuple[int, bytes]]) -> None:
        super().__init__(max(start + len(data) for start, data in parts))
        self.parts = parts

    def readinto(self, buffer: Any) -> int:
        for start, data in self.parts:
            if start <= self.position < start + len(data):
                found = memoryview(data)[self.position - start :][: len(buffer)]
                buffer[: len(found)] = found
                self.position += len(found)
                return len(found)
        return 0
