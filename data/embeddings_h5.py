"""Slide embeddings as the h5 files of TRIDENT, out and in: ``features`` (n, D) float32 and ``coords`` (n, 2) level-0 pixels.

``coords`` carries ``patch_size_level0`` (an integer, truncated, as theirs is), ``overlap``, ``name`` and ``savetodir``; beside them the
exact ``tile_size_level0`` and ``mpp``, so that our own files come back as they were. CLAM's features have the same two data
sets without attributes and are read when the tile's size is given.
"""

from pathlib import Path

import h5py
import numpy as np

from data.coordinates import row_major
from data.embeddings import EmbeddingStore, SlideEmbeddings
from data.fault import Fault


def export_h5(store: EmbeddingStore, slide: str, path: Path) -> None:
    """Write one slide of the store as a TRIDENT feature file; it appears under its name only when it is whole."""
    found = store.read(slide)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with h5py.File(partial, "w") as file:
        features = file.create_dataset("features", data=found.embeddings.astype(np.float32))
        features.attrs.update({"name": slide, "encoder": store.encoder, "encoder_hash": store.encoder_hash})
        coords = file.create_dataset("coords", data=found.coordinates)
        coords.attrs.update(
            {
                "patch_size_level0": int(found.tile_size_level0),
                "overlap": 0,
                "name": slide,
                "savetodir": str(path.parent),
                "tile_size_level0": found.tile_size_level0,
                "mpp": found.mpp,
            }
        )
    partial.replace(path)


def import_h5(path: Path, tile_size_level0: float | None = None, mpp: float | None = None) -> SlideEmbeddings:
    """One slide from a TRIDENT or CLAM feature file, put in row-major order; the slide's id is the file's stem.

    What the file's attributes say comes before ``tile_size_level0`` and ``mpp``. Raises Fault when neither says it, or when
    the file is not such a file.
    """
    path = Path(path)
    try:
        with h5py.File(path) as file:
            if "features" not in file or "coords" not in file:
                raise Fault(
                    f"{path} has no data sets 'features' and 'coords': it is not a TRIDENT or CLAM feature file."
                )
            features, coords = file["features"][()], file["coords"][()].astype(np.int64)
            of = dict(file["coords"].attrs)
    except OSError as error:
        raise Fault(f"{path} can't be read as h5 ({error}).") from error
    features, coords = features.reshape(-1, features.shape[-1]), coords.reshape(-1, 2)
    if len(features) != len(coords):
        raise Fault(f"{path} has {len(features)} features for {len(coords)} coordinates.")
    side = of.get("tile_size_level0", of.get("patch_size_level0", tile_size_level0))
    scale = of.get("mpp", mpp)
    if side is None or scale is None:
        raise Fault(
            f"{path} does not say its tiles' {'size at level 0' if side is None else 'µm per pixel'}: give it (tile_size_level0=…, mpp=…)."
        )
    order = row_major(coords[:, 0], coords[:, 1])
    return SlideEmbeddings(path.stem, features[order].astype(np.float16), coords[order], float(side), float(scale))
