"""Tile features that TRIDENT, CLAM or STAMP made, read as slide embeddings; the formats are described in `data.embeddings_h5`.

What a file doesn't say has to be told: CLAM's features don't say how large a tile is (its ``patches/<slide>.h5`` does, and is used where
it lies beside), nor does anything of CLAM's say the scale; STAMP counts in µm, and only the slide's own µm per pixel lead back to pixels.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from data.coordinates import row_major
from data.coordinates_h5 import read_coordinates_h5
from data.embeddings import SlideEmbeddings
from data.fault import Fault
from data.h5_files import opened
from data.slide_names import safe_ids

NO_FEATURES = "it is not a feature file of TRIDENT, CLAM or STAMP."


def list_features(folder: Path) -> dict[str, Path]:
    """The feature files of a folder by their slides' ids: ``h5_files/*.h5`` or ``pt_files/*.pt`` (CLAM), else ``*.h5``. Fault where there are none."""
    folder = Path(folder)
    for pattern in ("h5_files/*.h5", "pt_files/*.pt", "*.h5"):
        if found := sorted(folder.glob(pattern)):
            return dict(zip(safe_ids([path.stem for path in found]), found, strict=True))
    raise Fault(
        f"{folder} holds no features: give TRIDENT's or STAMP's folder of .h5 files, or CLAM's with h5_files or pt_files in it."
    )


def maker(path: Path) -> tuple[str | None, str | None]:
    """The name of the encoder that made a file, where it says so (STAMP's and ours do), and the encoder's hash (ours)."""
    if path.suffix != ".h5":
        return None, None
    with opened(path) as file:
        of = {**file.attrs, **(file["features"].attrs if "features" in file else {})}
    name, hash_ = of.get("extractor", of.get("encoder")), of.get("encoder_hash")
    return None if name is None else str(name), None if hash_ is None else str(hash_)


def width(path: Path) -> int:
    """How many dimensions the features of a file have. Fault where it is not such a file."""
    if path.suffix != ".h5":
        return int(_load(path).shape[-1])
    with opened(path) as file:
        name = "features" if "features" in file else "feats"
        if not isinstance(file.get(name), h5py.Dataset) or file[name].ndim < 2:
            raise Fault(f"{path} has no data set 'features' or 'feats' of a row a tile: {NO_FEATURES}")
        return int(file[name].shape[-1])


def import_features(
    path: Path, tile_size_level0: float | None = None, mpp: float | None = None, mpp_level0: float | None = None
) -> SlideEmbeddings:
    """One slide from a feature file, put in row-major order; the slide's id is the file's stem.

    tile_size_level0: a tile's side in level-0 pixels; mpp: µm per delivered pixel; mpp_level0: µm per level-0 pixel. What the file says
    comes before them. Where nobody says ``mpp``, TRIDENT's nominal 10 / magnification is taken. Raises Fault for what is still
    missing, for overlapping tiles, or when the file is not such a file.
    """
    path = Path(path)
    features, coords, said = _read_tensor(path) if path.suffix == ".pt" else _read_h5(path)
    if not np.isfinite(coords).all():
        raise Fault(f"{path} has coordinates that are not finite.")
    if len(features) != len(coords):
        raise Fault(f"{path} has {len(features)} features for {len(coords)} coordinates.")
    if said.get("overlap"):
        raise Fault(f"the tiles of {path} overlap, and a slide's sequence is of a grid: make them without overlap.")
    if said.get("unit") == "um":
        mpp_level0 = said.get("mpp_level0", mpp_level0)
        if mpp_level0 is None:
            raise Fault(
                f"{path} counts in µm, and nothing says how many µm a level-0 pixel of the slide has: give slides=, which do, or slides_mpp=."
            )
        said.setdefault("tile_size_level0", said["tile_size_um"] / mpp_level0)
        said.setdefault("mpp", said["tile_size_um"] / said["tile_size_px"])
        said["tile_size"] = said["tile_size_px"]
        coords = np.ceil(coords / mpp_level0 - 1e-6)  # a corner is rounded up, so that it stays in its cell
    side = said.get("tile_size_level0", tile_size_level0)
    if side is None:
        raise Fault(
            f"{path} does not say its tiles' size at level 0: put CLAM's folder 'patches' beside it, or give features_tile=."
        )
    pixels = int(said.get("tile_size", 0))
    scale = said.get("mpp", mpp)
    if scale is None and mpp_level0 is not None and pixels:
        scale = mpp_level0 * side / pixels
    if scale is None and "target_magnification" in said:
        scale = 10 / said["target_magnification"]
    if scale is None:
        raise Fault(f"{path} does not say its tiles' µm per pixel: give slides=, which do, or slides_mpp=.")
    coords = coords.astype(np.int64)
    order = row_major(coords[:, 0], coords[:, 1])
    size = (int(said.get("level0_width", 0)), int(said.get("level0_height", 0)))
    with np.errstate(over="ignore"):  # whoever stores it refuses infinities
        half = features[order].astype(np.float16)
    return SlideEmbeddings(path.stem, half, coords[order], float(side), float(scale), pixels, *size)


def _read_h5(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Features (n, D), coordinates (n, 2) as they are in the file, and what it or the file of patches beside it says."""
    with opened(path) as file:
        name = "features" if "features" in file else "feats"
        if name not in file or "coords" not in file:
            raise Fault(f"{path} has no data sets 'features' (or 'feats') and 'coords': {NO_FEATURES}")
        features, coords = file[name][()], file["coords"][()]
        of = {key: _plain(value) for holder in (file, file["coords"]) for key, value in holder.attrs.items()}
    said = {key: of[key] for key in OURS if key in of}
    if name == "feats":
        unit = of.get("unit")
        if unit != "um" or not {"tile_size_um", "tile_size_px"} <= of.keys():
            raise Fault(f"{path} has feats, but not STAMP's attributes unit='um', tile_size_um and tile_size_px.")
        return features, coords.reshape(-1, 2), said | {"unit": unit}
    if not said.get("tile_size"):
        said.pop("tile_size", None)
    if "patch_size_level0" in of:
        said = {
            "tile_size_level0": _untruncated(of["patch_size_level0"], coords),
            "tile_size": of.get("patch_size", 0),
        } | said
    elif "tile_size_level0" not in said:
        said |= _size(path) if "patch_size" in of and "downsample" in of else _patches(path)
    return features.reshape(-1, features.shape[-1]), coords.reshape(-1, 2), said


def _untruncated(side: int, coords: np.ndarray) -> int:
    """TRIDENT steps by a rounded side and writes it truncated: one pixel more, where all corners are multiples of that."""
    step = int(np.gcd.reduce(coords.astype(np.int64), axis=None)) if coords.size else 0
    return side + 1 if step % side and step % (side + 1) == 0 else side


OURS = (
    "tile_size_level0", "tile_size", "mpp", "mpp_level0", "tile_size_um", "tile_size_px", "overlap", "target_magnification",
    "level0_width", "level0_height",
)  # fmt: skip


def _read_tensor(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """CLAM's features without coordinates: these are the patches' own, in the same order."""
    features = _load(path)
    patches = _patches_path(path)
    if patches is None:
        raise Fault(f"{path} has no coordinates: put CLAM's folders 'patches' or 'h5_files' beside it.")
    places = read_coordinates_h5(patches)
    return features.float().numpy(), np.stack([places.x, places.y], axis=1), _patches(path)


def _load(path: Path) -> torch.Tensor:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise Fault(f"{path} can't be read as a tensor ({str(error).splitlines()[0]}).") from error


def _patches_path(path: Path) -> Path | None:
    """CLAM's patches of the same slide, in a folder beside the features' folder or its parent."""
    beside = [folder / "patches" / f"{path.stem}.h5" for folder in (path.parent, *path.parent.parents[:2])]
    return next((file for file in beside if file.is_file()), None)


def _patches(path: Path) -> dict[str, Any]:
    found = _patches_path(path)
    return _size(found) if found is not None else {}


def _size(path: Path) -> dict[str, Any]:
    places = read_coordinates_h5(path)
    return {"tile_size_level0": places.tile_size_level0, "tile_size": places.tile_size}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
