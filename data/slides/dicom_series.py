"""Which slide a DICOM file is of: one slide is one series, its pyramid's levels in a file or several each, and
openslide is given any of these."""

import struct
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

SERIES = 0x0020000E  # SeriesInstanceUID
SYNTAX = 0x00020010  # TransferSyntaxUID: how the elements after the first group are written
IMPLICIT = "1.2.840.10008.1.2"
UNREAD = ("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")  # big-endian, deflated: no slide is written so
ITEMS, ITEM, END_OF_ITEM, END_OF_ITEMS = "SQ", 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
LONG = ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")  # whose length has 4 bytes
UNDEFINED = 0xFFFFFFFF
MOST_ELEMENTS = 10_000  # in front of the series, of which there are some dozens


def one_of_each(files: Iterable[Path]) -> list[Path]:
    """The first file of each series in each folder, of DICOM files; a file whose series can't be read counts as one of
    its own."""
    named = sorted((str(file.parent), series_of(file) or f" {file}", file) for file in files)
    return [next(iter(group))[2] for _, group in groupby(named, key=lambda row: row[:2])]


def series_of(path: Path) -> str | None:
    """The SeriesInstanceUID that a file's header says, of which some KB are read; None where there is none to be
    read."""
    try:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                return None
            return next((value for tag, value in _texts(file) if tag == SERIES), None)
    except (OSError, struct.error):
        return None


def _texts(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Tags of the outermost elements up to the series, and the text of the two that matter here. Raises struct.error
    where the file ends."""
    explicit, depth, first_group = True, 0, True
    for _ in range(MOST_ELEMENTS):
        group, element = struct.unpack("<HH", file.read(4))
        tag = group << 16 | element
        if first_group and group != 2:
            first_group = False
        kind = ""
        if group != 0xFFFE and (explicit or first_group):
            kind = file.read(2).decode("latin-1")
            if kind in LONG:
                _, size = struct.unpack("<HI", file.read(6))
            else:
                (size,) = struct.unpack("<H", file.read(2))
        else:
            (size,) = struct.unpack("<I", file.read(4))
        if depth == 0 and tag > SERIES:
            return
        if tag == END_OF_ITEMS:
            depth -= 1
        elif size == UNDEFINED:  # what is inside follows, up to a mark of its end
            depth += tag != ITEM
        elif depth == 0 and tag in (SERIES, SYNTAX):
            value = file.read(size).rstrip(b"\0 ").decode("latin-1")
            if tag == SYNTAX:
                if value in UNREAD:
                    return
                explicit = value != IMPLICIT
            yield tag, value
        else:
            file.seek(size, 1)
