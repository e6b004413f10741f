"""Arrays that a curation keeps on its way, each a file that appears whole, so that whoever is stopped goes on behind the last
one."""

from pathlib import Path

import numpy as np

from data.fault import Fault
from data.files import appearing
from data.npz_files import SPOILT


def keep_array(path: Path, values: np.ndarray) -> None:
    """Write it."""
    with appearing(path) as partial, partial.open("wb") as file:
        np.save(file, values)


def kept_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """What `keep_array` wrote. Raises Fault where it is damaged, or of another shape."""
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
        if found.shape != shape:
            raise ValueError(f"{found.shape} is not {shape}")
    except SPOILT as error:
        raise Fault(f"{path} is damaged ({error}): delete it, and the same command makes it anew.") from error
    return found
