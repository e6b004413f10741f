"""Features and coordinates as they lie in the files of other programs: h5, tensors and arrays, with what they say about
themselves.

    h5    features (TRIDENT, CLAM), feats (STAMP), features/<encoder> (AtlasPatch), beside coords, of two columns or AtlasPatch's five
    pt    a tensor (CLAM, slide2vec), a list of rows, or a dictionary of features and perhaps coords
    npz   features and perhaps coords (slide2vec); npy: features

Nothing is interpreted here, and nothing is read that the file can't hold: a few KB may claim any number of rows.
"""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from data.fault import Fault
from data.git_lfs import refuse_pointer
from data.h5_files import opened
from data.npz_files import SPOILT
from data.torch_files import why_unreadable

FEATURES = ("features", "feats", "embeddings")
COORDS = ("coords", "coordinates")
MOST_COMPRESSED = 1000  # times that an array may be larger than the file that it comes from
SMALL = 64 << 20  # bytes, of which nobody runs out
NO_FEATURES = "it is not a feature file of TRIDENT, AtlasPatch, CLAM, STAMP or slide2vec."


@dataclass(frozen=True)
class RawFeatures:
    """``features`` (n, D), D = 0 where a slide without tiles doesn't say; ``coords`` (n, 2) or None; attributes by
    name; ``kind`` is the name of the features' data set, ``encoder`` that of an encoder where they are kept under
    it."""

    features: np.ndarray
    coords: np.ndarray | None
    attributes: dict[str, Any]
    kind: str
    encoder: str | None = None


@dataclass
class FileArrays:
    """What a file holds: ways to read an array and its shape, by name; nothing is read yet."""

    path: Path
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    read: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    def hold(self, name: str, shape: tuple[int, ...], size: int, read: Callable[[], np.ndarray]) -> None:
        """Add an array of so many bytes. Raises Fault where the file can't hold that."""
        there = self.path.stat().st_size
        if size > SMALL and size > MOST_COMPRESSED * there:
            raise Fault(
                f"{self.path} says that {name} is {' × '.join(f'{n:,}' for n in shape)}, and has {there:,} bytes: it is"
                " damaged, or was never filled"
            )
        self.shapes[name], self.read[name] = shape, read

    def features(self, encoder: str | None) -> str:
        """The name of the features: of ``encoder`` where there are several. Raises Fault where it can't be known."""
        found = [name for name in self.shapes if name in FEATURES]
        of_encoders = [name for name in self.shapes if name.startswith("features/")]
        if found or not of_encoders:
            if not found:
                raise Fault(
                    f"{self.path} has no data set 'features' or 'feats' of a row a tile (it holds"
                    f" {', '.join(self.shapes) or 'nothing'}): {NO_FEATURES}"
                )
            return found[0]
        wanted = (
            of_encoders if len(of_encoders) == 1 else [name for name in of_encoders if name == f"features/{encoder}"]
        )
        if not wanted:
            names = ", ".join(name.removeprefix("features/") for name in of_encoders)
            raise Fault(f"{self.path} has features of several encoders ({names}): say which, encoder=….")
        return wanted[0]


def read_arrays(path: Path, encoder: str | None = None) -> RawFeatures:
    """The features of a file, of ``encoder`` where it has several's. Raises Fault where there are none, or the file
    can't be read."""
    with opened_arrays(path) as held:
        name = held.features(encoder)
        try:
            features = held.read[name]()
            place = next((place for place in COORDS if place in held.shapes), None)
            coords = None if place is None else held.read[place]()
        except MemoryError as error:
            raise Fault(f"{path} is larger than the memory here ({' × '.join(map(str, held.shapes[name]))})") from error
        of = name.removeprefix("features/") if name.startswith("features/") else None
        return RawFeatures(
            _rows(path, features),
            None if coords is None else _places(path, coords),
            held.attributes,
            name.partition("/")[0],
            of,
        )


def width_and_encoder(path: Path, encoder: str | None = None) -> tuple[int, str | None, dict[str, Any]]:
    """How many dimensions the features have (0 where a slide without tiles doesn't say), the encoder under whose name
    they are kept, and attributes."""
    with opened_arrays(path) as held:
        name = held.features(encoder)
        shape = held.shapes[name]
        of = name.removeprefix("features/") if name.startswith("features/") else None
        return 0 if shape == (0,) else int(shape[-1]) if shape else 0, of, held.attributes


@contextmanager
def opened_arrays(path: Path) -> Iterator[FileArrays]:
    """What a file holds, to read while the block lasts. Raises Fault for a file that can't be read."""
    held = FileArrays(path)
    if path.is_file():
        refuse_pointer(path)
    if path.suffix in (".h5", ".hdf5"):
        with opened(path) as file:
            _find_in_h5(held, file)
            yield held
    elif path.suffix in (".npz", ".npy"):
        _find_in_npz(held)
        yield held
    else:
        _find_in_tensors(held)
        yield held


def _find_in_h5(held: FileArrays, file: h5py.File) -> None:
    datasets = {name: entry for name, entry in file.items() if isinstance(entry, h5py.Dataset)}
    if isinstance(file.get("features"), h5py.Group):
        datasets |= {
            f"features/{name}": entry for name, entry in file["features"].items() if isinstance(entry, h5py.Dataset)
        }
    for name, entry in datasets.items():
        if entry.shape is not None and (name in (*FEATURES, *COORDS) or name.startswith("features/")):
            held.hold(name, entry.shape, entry.size * entry.dtype.itemsize, partial(entry.__getitem__, ()))
    for holder in (file, *datasets.values()):
        held.attributes |= dict(holder.attrs)


def _find_in_npz(held: FileArrays) -> None:
    path = held.path
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            held.hold("features", array.shape, array.nbytes, partial(np.array, array))
            return
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
        if sum(sizes.values()) > max(SMALL, MOST_COMPRESSED * path.stat().st_size):
            raise Fault(f"{path} would unpack to {sum(sizes.values()):,} bytes: it is damaged")
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                if name in (*FEATURES, *COORDS):
                    held.hold(name, array.shape, array.nbytes, partial(np.asarray, array))
                elif array.size == 1:
                    held.attributes[name] = array.item()
    except FileNotFoundError as error:
        raise Fault(f"there is no file {path}") from error
    except SPOILT as error:
        raise Fault(f"{path} can't be read as arrays ({error})") from error


def _find_in_tensors(held: FileArrays) -> None:
    path = held.path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise Fault(
            f"{path} can't be read as a tensor ({why_unreadable(error)}): save the features as a tensor, alone or in a"
            " dictionary, or make it again."
        ) from error
    if isinstance(content, list | tuple) and content and all(isinstance(row, torch.Tensor) for row in content):
        shapes = {tuple(row.shape) for row in content}
        if len(shapes) == 1 and next(iter(shapes))[:-1] in ((), (1,)):
            content = torch.stack([row.reshape(-1) for row in content])
        elif len(content) == 2 and content[1].ndim == 2 and content[1].shape == (len(content[0]), 2):
            content = {"features": content[0], "coords": content[1]}
    if isinstance(content, torch.Tensor):
        content = {"features": content}
    if not isinstance(content, dict):
        raise Fault(
            f"{path} holds a {type(content).__name__}, and neither a tensor nor a dictionary of features: {NO_FEATURES}"
        )
    for name, value in content.items():
        if name in (*FEATURES, *COORDS) and isinstance(value, torch.Tensor):
            held.hold(name, tuple(value.shape), value.numel() * value.element_size(), partial(_as_array, value))
        elif isinstance(value, int | float | str):
            held.attributes[str(name)] = value
    if not held.shapes:
        raise Fault(
            f"{path} holds {', '.join(map(str, list(content)[:5])) or 'nothing'}, and no tensor called features:"
            f" {NO_FEATURES}"
        )


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise Fault("it holds a tensor that is sparse, quantised or without values: save it again as an ordinary one.")
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()


def _rows(path: Path, features: np.ndarray) -> np.ndarray:
    """(n, D) of (n, D), (1, n, D), (D,) of a single tile, and of nothing."""
    if features.ndim == 1:
        return features.reshape(0, 0) if not features.size else features[None]
    if (
        features.ndim < 1
        or features.ndim > 3
        or (features.ndim == 3 and 1 not in features.shape[:2])
        or features.dtype.kind not in "fiu"
    ):
        raise Fault(
            f"{path} has features of shape {features.shape} and type {features.dtype}, not a row of numbers a tile."
        )
    if (
        features.dtype.kind in "iu" and features.size
    ):  # bfloat16's bits under another name, or quantised ones: numbers of their own would be taken
        raise Fault(
            f"{path} has features of type {features.dtype}, whole numbers, which no encoder gives: save them as float32"
            " or float16."
        )
    return features.reshape(int(np.prod(features.shape[:-1])), features.shape[-1])


def _places(path: Path, coords: np.ndarray) -> np.ndarray:
    """(n, 2) of that, of (1, n, 2), of AtlasPatch's x, y, width, height and level, and of nothing."""
    if not coords.size:
        return np.zeros((0, 2), np.int64)
    if coords.dtype.names and {"x", "y"} <= {*coords.dtype.names}:
        return np.stack([coords["x"].ravel(), coords["y"].ravel()], axis=1)
    if coords.ndim < 2 or coords.shape[-1] not in (2, 5) or coords.dtype.kind not in "fiu":
        raise Fault(
            f"{path} has coordinates of shape {coords.shape} and type {coords.dtype}, not x and y of each tile."
        )
    return coords.reshape(-1, coords.shape[-1])[:, :2]
