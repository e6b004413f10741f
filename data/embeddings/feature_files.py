"""Tile features that other programs made, read as slide embeddings: what their files say and what must be told.

What a file doesn't say has to be told: CLAM's features don't say how large a tile is (its ``patches/<slide>.h5`` does,
and is used where it lies beside), nor does anything of CLAM's say the scale; STAMP counts in µm, and only the slide's
own µm per pixel lead back to pixels. slide2vec's lie in a folder of their own (`data.embeddings.slide2vec`). The
formats are read in `data.embeddings.feature_arrays`; ours are described in `data.embeddings.h5`.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.embeddings import slide2vec
from data.embeddings.feature_arrays import RawFeatures, read_arrays, width_and_encoder
from data.embeddings.store import SlideEmbeddings
from data.fault import Fault, Notice
from data.slides.coordinates import FARTHEST, row_major
from data.slides.coordinates_h5 import read_coordinates_h5
from data.slides.mpp import COARSEST, FINEST
from data.slides.names import safe_ids
from data.slides.plausible_places import misread, refuse_impossible
from data.stated_numbers import stated_number, text

UNITS = ("level0", "cells", "um")
SAID_AS = {
    "um": "um",
    "µm": "um",
    "μm": "um",
    "micron": "um",
    "microns": "um",
    "micrometer": "um",
    "level0": "level0",
    "px": "level0",
    "pixel": "level0",
    "pixels": "level0",
    "cell": "cells",
    "cells": "cells",
    "grid": "cells",
    "tile": "cells",
    "tiles": "cells",
}
# Of a file's features, in this order: where they lie and what they are.
PATTERNS = (
    "h5_files/*.h5",
    "pt_files/*.pt",
    "tile_embeddings/*.npz",
    "tile_embeddings/*.pt",
    "*.h5",
    "*.hdf5",
    "*.npz",
    "*.pt",
    "*.pth",
    "*.npy",
    "features/*.pt",
    "patches/*.h5",
)
BESIDE = {Path(pattern).parent.name for pattern in PATTERNS} | {
    "coordinates",
    "tiles",
    "masks",
    "stitches",
}  # folders that a program has beside its features
ROUNDED = 1.3  # magnifications are: 0.23 µm is called 40× by some, and 43× by others
COARSEST_TILE = 100.0  # µm per delivered pixel: a tile of 256 is larger than a slide
WAY_OUT = "give features_unit=level0, cells or um."


@dataclass(frozen=True)
class Imported:
    """A slide's embeddings, and how many rows of its file were left out of them: not finite in float16, or at a place
    that had a row already."""

    slide: SlideEmbeddings
    not_finite: int = 0
    double: int = 0


def list_features(folder: Path) -> dict[str, Path]:
    """The feature files of a folder by their slides' ids: those of the first of `PATTERNS` that there are. Fault where
    there are none."""
    folder = Path(folder)
    for pattern in PATTERNS:
        if found := [path for path in sorted(folder.glob(pattern)) if not path.name.startswith(".") and path.is_file()]:
            _name_others(folder, found)
            return dict(zip(safe_ids([path.stem for path in found]), found, strict=True))
    raise Fault(
        f"{folder} holds no features: give a folder of TRIDENT's, AtlasPatch's or STAMP's .h5 files, of .pt or .npz"
        " files, or CLAM's with h5_files or pt_files in it."
    )


def _name_others(folder: Path, taken: list[Path]) -> None:
    """Say what else looks like features, but for what lies beside those that are taken: coordinates, other forms of the
    same slides."""
    stems = tuple({path.stem for path in taken})
    endings = {Path(pattern).suffix for pattern in PATTERNS}
    others: dict[str, list[str]] = {}
    for path in sorted({*folder.iterdir(), *taken[0].parent.iterdir()} - {*taken}):
        if path.name.startswith(".") or path.suffix.lower() not in endings:
            within = (
                path.is_dir()
                and path.name not in BESIDE
                and next((file for file in path.iterdir() if file.suffix.lower() in endings), None)
            )
            if within:
                others.setdefault("in a folder of its own: give that one too, by a command of its own", []).append(
                    f"{path.name}/{within.name}"
                )
        elif not path.is_file():
            why = "a link to what isn't there" if path.is_symlink() and not path.exists() else "no file"
            others.setdefault(why, []).append(path.name)
        elif not path.name.startswith(stems):
            capitals = path.suffix != path.suffix.lower()
            why = (
                f"its ending is in capitals, rename it to {path.suffix.lower()}"
                if capitals
                else f"features of another kind than {taken[0].name}; take them over from a folder of their own"
            )
            others.setdefault(why, []).append(path.name)
    for why, names in others.items():
        named = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(f"left out: {named}: {why}", Notice, stacklevel=2)


def maker(path: Path, encoder: str | None = None) -> tuple[str | None, str | None]:
    """The name of the encoder that made a file, where it says so (STAMP's, AtlasPatch's and ours do), and the encoder's
    hash (ours)."""
    _, kept_under, of = width_and_encoder(path, encoder)
    name, hash_ = of.get("extractor", of.get("encoder", kept_under)), of.get("encoder_hash")
    return None if name is None else text(name), None if hash_ is None else text(hash_)


def width(path: Path, encoder: str | None = None) -> int:
    """How many dimensions the features of a file have; 0 of a slide without tiles that doesn't say. Fault where it is
    not such a file."""
    return width_and_encoder(path, encoder)[0]


def import_features(
    path: Path,
    tile_size_level0: float | None = None,
    mpp: float | None = None,
    mpp_level0: float | None = None,
    *,
    unit: str | None = None,
    encoder: str | None = None,
) -> Imported:
    """One slide from a feature file, put in row-major order; the slide's id is the file's stem.

    tile_size_level0: a tile's side in level-0 pixels; mpp: µm per delivered pixel; mpp_level0: µm per level-0 pixel;
    unit: of `UNITS`, what coordinates count. What the file says comes before them. Where nobody says ``mpp``, TRIDENT's
    nominal 10 / magnification is taken. encoder: whose features, of several. Raises Fault for what is still missing,
    for overlapping tiles, or when the file is not such a file.
    """
    path = Path(path)
    raw = read_arrays(path, encoder)
    coords, said = _told(path, raw)
    features = raw.features
    if len(features) != len(coords):
        raise Fault(f"{path} has {len(features)} features for {len(coords)} coordinates.")
    if said.get("overlap"):
        raise Fault(f"the tiles of {path} overlap, and a slide's sequence is of a grid: make them without overlap.")
    size = int(said.get("level0_width", 0)), int(said.get("level0_height", 0))
    unit = said.get("unit") or _usual(said, coords, size, unit) or unit
    if unit is None and raw.kind == "feats":
        raise Fault(f"{path} has feats, as STAMP's files, and does not say what its coordinates count: {WAY_OUT}")
    side = said.get("tile_size_level0", tile_size_level0)
    scale, pixels = said.get("mpp"), int(said.get("tile_size", said.get("tile_size_px", 0)))
    microns, mpp_level0 = said.get("tile_size_um"), said.get("mpp_level0", mpp_level0)
    if unit == "um" or microns is not None:
        if mpp_level0 is None:
            raise Fault(
                f"{path} counts in µm, and nothing says how many µm a level-0 pixel of the slide has: give slides=,"
                " which do, or slides_mpp=."
            )
        if side is None and microns is not None:
            side = microns / mpp_level0
        if scale is None and microns is not None and pixels:
            scale = microns / pixels
    if side is None:
        raise Fault(
            f"{path} does not say its tiles' size at level 0: put CLAM's folder 'patches' beside it, or give"
            " features_tile=."
        )
    scale = mpp if scale is None else scale
    if scale is None and mpp_level0 is not None and pixels:
        scale = mpp_level0 * side / pixels
    scale = said.get("nominal_mpp") if scale is None else scale
    if scale is None and "target_magnification" in said:
        scale = 10 / said["target_magnification"]
    if scale is None:
        ways_out = "slides=, which do, or slides_mpp= of these, or " if pixels and mpp_level0 is None else ""
        raise Fault(f"{path} does not say its tiles' µm per pixel: give {ways_out}features_mpp=.")
    _refuse_sizes(path, float(side), float(scale), mpp_level0, (*size, pixels))
    _refuse_contradiction(path, said)
    if unit == "um":
        assert mpp_level0 is not None
        coords = np.ceil(coords / mpp_level0 - 1e-6)  # a corner is rounded up, so that it stays in its cell
    elif unit == "cells":
        coords = np.ceil(coords * side - 1e-6)
    refuse_impossible(path, coords)
    if wrong := misread(coords, side, width=size[0], height=size[1]):
        raise Fault(f"{path} {wrong}: {WAY_OUT}")
    coords = coords.astype(np.int64)
    with np.errstate(over="ignore"):
        half = features.astype(np.float16)
    finite = np.isfinite(half).all(axis=1) if half.size else np.ones(len(half), bool)
    _, first = np.unique(coords, axis=0, return_index=True) if len(coords) else (None, np.zeros(0, np.int64))
    kept = np.zeros(len(coords), bool)
    kept[first] = True
    double = int((~kept).sum())
    half, coords = half[kept & finite], coords[kept & finite]
    order = row_major(coords[:, 0], coords[:, 1])
    found = SlideEmbeddings(path.stem, half[order], coords[order], float(side), float(scale), pixels, *size)
    return Imported(found, int((kept & ~finite).sum()), double)


FEATURE_NUMBERS = (
    "tile_size_level0",
    "tile_size",
    "mpp",
    "mpp_level0",
    "tile_size_um",
    "tile_size_px",
    "overlap",
    "target_magnification",
    "level0_magnification",
    "level0_width",
    "level0_height",
    "patch_size_level0",
    "patch_size",
    "downsample",
)


def _told(path: Path, raw: RawFeatures) -> tuple[np.ndarray, dict[str, Any]]:
    """Coordinates (n, 2) as they are counted, and what the file, or one beside it, says."""
    said: dict[str, Any] = {
        name: value
        for name in FEATURE_NUMBERS
        if (value := stated_number(path, name, raw.attributes.get(name))) is not None
    }
    if (unit := raw.attributes.get("unit", raw.attributes.get("coords_unit"))) is not None:
        if text(unit).lower() not in SAID_AS:
            raise Fault(
                f"{path} counts its coordinates in {text(unit)!r}, which is none of {', '.join(UNITS)}: give it with"
                " another unit."
            )
        said["unit"] = SAID_AS[text(unit).lower()]
    coords, patches = raw.coords, _patches_path(path)
    if coords is None and (beside := slide2vec.beside(path)) is not None:
        coords, more = slide2vec.read_slide2vec(beside)
        said = more | said
    if (
        coords is None and patches is not None
    ):  # CLAM's features without coordinates: these are the patches' own, in the same order
        places = read_coordinates_h5(patches)
        coords = np.stack([places.x, places.y], axis=1)
    if coords is None:
        raise Fault(
            f"{path} has no coordinates: put CLAM's folders 'patches' or 'h5_files', or slide2vec's 'coordinates',"
            " beside it."
        )
    refuse_impossible(path, coords)
    if "tile_size_level0" in said:
        said["usual_unit"] = "level0"  # it is of ours, or slide2vec's
    else:
        if "patch_size_level0" in said:
            said["tile_size_level0"] = _untruncated(said["patch_size_level0"], coords)
            said.setdefault("tile_size", said.get("patch_size", 0))
            said["usual_unit"] = "level0"
        elif (
            raw.kind == "features"
            and (source := path if {"patch_size", "downsample"} <= said.keys() and path.suffix == ".h5" else patches)
            is not None
        ):
            places = read_coordinates_h5(source)
            said |= {"tile_size_level0": places.tile_size_level0, "tile_size": places.tile_size}
            said["usual_unit"] = "level0"
    return coords, said


def _usual(said: dict[str, Any], coords: np.ndarray, size: tuple[int, int], wanted: str | None) -> str | None:
    """The unit that the program which wrote the file counts in; what the user says in its place, where the coordinates
    can't be in that."""
    usual = said.get("usual_unit")
    if usual is None or wanted is None:
        return usual
    return wanted if misread(coords, said["tile_size_level0"], width=size[0], height=size[1]) else usual


def _refuse_sizes(
    path: Path, side: float, scale: float, mpp_level0: float | None, pixels: tuple[int, int, int]
) -> None:
    """Raise Fault where a tile or its slide has a size, or a scale, that none has."""
    if max(pixels) >= FARTHEST:
        raise Fault(
            f"{path} says that its slide has {pixels[0]:.3g} × {pixels[1]:.3g} pixels, and a tile {pixels[2]:.3g} a"
            " side, which no slide has."
        )
    if not 1 <= side < FARTHEST:
        raise Fault(f"{path} says that a tile has {side:.3g} level-0 pixels a side, which no tile has.")
    if not FINEST <= scale <= COARSEST_TILE:
        raise Fault(
            f"{path} says that a pixel of its tiles is {scale:.3g} µm wide, and it is {FINEST:g} to {COARSEST_TILE:g}: "
            "put its mpp or target_magnification right."
        )
    if mpp_level0 is not None and not FINEST <= mpp_level0 <= COARSEST:
        raise Fault(f"{path} says that a pixel of its slide is {mpp_level0:.3g} µm wide, which no slide's is.")


def _refuse_contradiction(path: Path, said: dict[str, Any]) -> None:
    """Raise Fault where magnifications and sizes can't all be true: a tile's side at level 0 is its pixels times the
    one over the other."""
    names = ("tile_size_level0", "tile_size", "level0_magnification", "target_magnification")
    if all(said.get(name) for name in names):
        side, pixels, scanned, wanted = (said[name] for name in names)
        if not 1 / ROUNDED < side / pixels / (scanned / wanted) < ROUNDED:
            raise Fault(
                f"{path} contradicts itself: tiles of {pixels:g} pixels at {wanted:g}× are"
                f" {pixels * scanned / wanted:g} level-0 pixels a side of a slide scanned at {scanned:g}×, and it says"
                f" {side:g}: put its attributes right, or leave this slide out."
            )


def _untruncated(side: float, coords: np.ndarray) -> float:
    """TRIDENT steps by a rounded side and writes it truncated: one pixel more, where all corners are multiples of
    that."""
    step = int(np.gcd.reduce(coords.astype(np.int64), axis=None)) if coords.size and side % 1 == 0 else 0
    return side + 1 if step % side and step % (side + 1) == 0 else side


def _patches_path(path: Path) -> Path | None:
    """CLAM's patches of the same slide, in a folder beside the features' folder or its parent."""
    beside = [folder / "patches" / f"{path.stem}.h5" for folder in (path.parent, *path.parent.parents[:2])]
    return next((file for file in beside if file.is_file()), None)
