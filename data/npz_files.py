"""``.npz`` files: their columns written piece by piece and mapped, and read where bytes may have been changed, from
threads too."""

import mmap
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

Place = tuple[np.dtype, int, int]
"""A column in a file: its dtype, first byte and number of rows."""

# What reading an npz raises where its bytes were changed: zipfile, json, and numpy's way of reading a header.
SPOILT = (
    zipfile.BadZipFile,
    ValueError,
    KeyError,
    EOFError,
    OSError,
    SyntaxError,
    tokenize.TokenError,
    NotImplementedError,
    zlib.error,
)


def read_int64(npy: bytes) -> np.ndarray:
    """The one-dimensional int64 array of a .npy file. numpy's own reader has Python's parser read the header, which
    threads of Python 3.11 can't do at the same time (SystemError: AST constructor recursion depth mismatch), and tiles
    are read by threads."""
    start = 10 + int.from_bytes(npy[8:10], "little")
    if npy[:8] != b"\x93NUMPY\x01\x00" or b"'descr': '<i8', 'fortran_order': False" not in npy[:start]:
        raise ValueError("its columns are not int64")
    return np.frombuffer(npy, "<i8", offset=start)


def write_column(archive: zipfile.ZipFile, name: str, dtype: np.dtype, rows: int, pieces: Iterable[np.ndarray]) -> None:
    """Write a column of so many ``rows`` into an uncompressed npz, a piece at a time."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(member, header)
        for piece in pieces:
            member.write(piece.astype(dtype).tobytes())


def place_of(archive: zipfile.ZipFile, raw: IO[bytes], name: str) -> Place:
    """Where a column lies in the uncompressed npz ``raw``, which is open as ``archive``."""
    # A zip member's data begins behind its local header: 30 bytes, then the name and the extra field.
    start = archive.getinfo(f"{name}.npy").header_offset
    raw.seek(start + 26)
    raw.seek(start + 30 + sum(int.from_bytes(raw.read(2), "little") for _ in range(2)))
    np.lib.format.read_magic(raw)
    shape, _, dtype = np.lib.format.read_array_header_1_0(raw)
    return dtype, raw.tell(), shape[0]


def mapped(path: Path, place: Place) -> np.ndarray:
    """A column of an uncompressed npz, memory-mapped, as a plain array: looking up one row is three times as quick as in
    a memmap."""
    dtype, start, rows = place
    return np.asarray(np.memmap(path, dtype, "r", start, (rows,))) if rows else np.empty(0, dtype)


def let_go(column: np.ndarray) -> None:
    """Give back the memory of what was looked at of a `mapped` column; it is read again when it is asked for. Of another
    array there is nothing to give back."""
    owner: Any = column
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)
