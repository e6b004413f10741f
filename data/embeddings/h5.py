"""Slide embeddings as the files of TRIDENT, CLAM and STAMP: written here, read in `data.embeddings.feature_files`.

    TRIDENT  <slide>.h5            features (n, D) float32, coords (n, 2) int64 level-0 pixels with the attributes of its patches
    CLAM     h5_files/<slide>.h5   features and coords as above; pt_files/<slide>.pt: features as a tensor
    STAMP    <slide>.h5            feats (n, D) float16, coords (n, 2) float64 µm; unit, tile_size_um, tile_size_px, extractor

Rows are in row-major order. Beside their attributes are ours: ``tile_size_level0`` exact where theirs is truncated, and
``mpp``, so that our own files come back as they were.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch

from data.embeddings.store import EmbeddingStore, SlideEmbeddings
from data.fault import Fault
from data.files import appearing


def export_trident(store: EmbeddingStore, slide: str, folder: Path) -> None:
    """Write one slide as a TRIDENT feature file."""
    found, path = store.read(slide), folder / f"{slide}.h5"
    with _whole(path) as file:
        features = file.create_dataset("features", data=found.embeddings.astype(np.float32))
        features.attrs.update({"name": slide, "savetodir": str(folder)} | _encoder(store))
        coords = file.create_dataset("coords", data=found.coordinates)
        coords.attrs.update({"name": slide, "savetodir": str(folder), "overlap": 0} | _ours(found))
        coords.attrs["patch_size_level0"] = int(found.tile_size_level0)
        if np.isfinite(found.mpp):
            coords.attrs["target_magnification"] = round(10 / found.mpp)
        if found.tile_size:
            coords.attrs["patch_size"] = found.tile_size
            coords.attrs["level0_magnification"] = round(10 / mpp_level0(found))
        if found.slide_width:
            coords.attrs.update({"level0_width": found.slide_width, "level0_height": found.slide_height})


def export_clam(store: EmbeddingStore, slide: str, folder: Path) -> None:
    """Write one slide as CLAM's two feature files. ``coords`` has the attributes of CLAM's patches, counted at level 0,
    where a tile is a whole number of level-0 pixels."""
    found = store.read(slide)
    features = found.embeddings.astype(np.float32)
    tensor = folder / "pt_files" / f"{slide}.pt"
    with appearing(tensor) as partial:
        torch.save(torch.from_numpy(features), partial)
    with _whole(folder / "h5_files" / f"{slide}.h5") as file:
        file.create_dataset("features", data=features).attrs.update(_encoder(store))
        coords = file.create_dataset("coords", data=found.coordinates)
        coords.attrs.update({"name": slide, "save_path": str(folder / "h5_files")} | _ours(found))
        if found.tile_size_level0 == int(found.tile_size_level0):
            coords.attrs.update({"patch_size": int(found.tile_size_level0), "patch_level": 0, "downsample": [1.0, 1.0]})
        if found.slide_width:
            size = [found.slide_width, found.slide_height]
            coords.attrs.update({"level_dim": size, "downsampled_level_dim": size})


def export_stamp(store: EmbeddingStore, slide: str, folder: Path) -> None:
    """Write one slide as a STAMP feature file. Raises Fault where the store doesn't say its scale on the slide."""
    found = store.read(slide)
    if not found.tile_size or not np.isfinite(found.mpp):
        raise Fault(
            f"{store.folder} doesn't say how many pixels and µm the tiles of {slide} have, and STAMP counts in µm: "
            "embed the slide again into a new folder, or export to trident or clam."
        )
    with _whole(folder / f"{slide}.h5") as file:
        file.create_dataset("feats", data=found.embeddings)
        file.create_dataset("coords", data=found.coordinates * mpp_level0(found))
        size = {"unit": "um", "tile_size_um": found.tile_size * found.mpp, "tile_size_px": found.tile_size}
        file.attrs.update(
            size
            | {"extractor": store.encoder, "feat_type": "tile", "mpp_level0": mpp_level0(found)}
            | _encoder(store)
            | _ours(found)
        )
        if found.slide_width:
            file.attrs.update({"level0_width": found.slide_width, "level0_height": found.slide_height})


EXPORTS: dict[str, Callable[[EmbeddingStore, str, Path], None]] = {
    "trident": export_trident,
    "clam": export_clam,
    "stamp": export_stamp,
}


def is_exported(kind: str, slide: str, folder: Path) -> bool:
    """Whether the files of a slide are there, whole."""
    return (folder / "h5_files" / f"{slide}.h5" if kind == "clam" else folder / f"{slide}.h5").exists()


def mpp_level0(found: SlideEmbeddings) -> float:
    """µm per level-0 pixel, of a slide whose ``tile_size`` is known."""
    return found.mpp * found.tile_size / found.tile_size_level0


def _encoder(store: EmbeddingStore) -> dict[str, object]:
    return {"encoder": store.encoder, "encoder_hash": store.encoder_hash}


def _ours(found: SlideEmbeddings) -> dict[str, object]:
    return {"tile_size_level0": found.tile_size_level0, "mpp": found.mpp, "tile_size": found.tile_size}


@contextmanager
def _whole(path: Path) -> Iterator[h5py.File]:
    """An h5 to fill, which appears under its name only when it is whole."""
    with appearing(path) as partial, h5py.File(partial, "w") as file:
        yield file
