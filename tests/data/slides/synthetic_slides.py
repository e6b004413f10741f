"""Small whole-slide images made on the spot: tiled TIFF pyramids that openslide reads as generic-tiff."""

from pathlib import Path

import numpy as np
import tifffile

from data.keyed import rng

GLASS, TISSUE = (243, 243, 244), (190, 110, 170)


def stained(height: int, width: int, blobs: list[tuple[int, int, int]], seed: int = 0) -> np.ndarray:
    """Glass with textured discs of tissue at (x, y, radius): uint8 (height, width, 3)."""
    image = np.empty((height, width, 3), dtype=np.float32)
    image[:] = GLASS
    rows, columns = np.mgrid[:height, :width]
    noise = rng(seed, "stain").normal(0, 18, (height, width, 1)).astype(np.float32)
    for x, y, radius in blobs:
        inside = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
        image[inside] = (np.array(TISSUE, dtype=np.float32) + noise)[inside]
    return np.clip(image, 0, 255).astype(np.uint8)


def write_slide(path: Path, image: np.ndarray, mpp: float | None, mpp_y: float | None = None, levels: int = 1) -> Path:
    """Write a lossless tiled TIFF with ``levels`` levels, each half of the last, and its resolution in the tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            reduced = image[:: 2**level, :: 2**level]
            tags = (
                {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / (mpp_y or mpp)), "resolutionunit": "CENTIMETER"}
            )
            tiff.write(
                np.ascontiguousarray(reduced),
                tile=(128, 128),
                compression="deflate",
                photometric="rgb",
                subfiletype=int(level > 0),
                metadata=None,
                **tags,
            )
    return path
