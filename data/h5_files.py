"""Opening h5 files, ours and others', with one sentence for whatever is wrong with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from data.fault import Fault
from data.git_lfs import refuse_pointer
from data.remote import RemotePath


@contextmanager
def opened(path: Path | RemotePath, way_out: str = "") -> Iterator[h5py.File]:
    """The open file, to read. What is wrong with it shows when it is opened or only when it is read: a Fault either
    way.

    ``way_out``: what to do about a broken one, where that is known.
    """
    try:
        with h5py.File(path if isinstance(path, Path) else path.open(), "r") as file:
            yield file
    except FileNotFoundError as error:
        raise Fault(f"there is no file {path}") from error
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(path, Path) and path.is_file():
            refuse_pointer(path)
        raise Fault(f"{path} can't be read as h5 ({error}){way_out and f': {way_out}'}") from error
