"""A whole-slide image: opened, questioned and read, with every refusal in one clear sentence.

Any format that openslide reads. Memory is bounded: pixels are read tile by tile, and a thumbnail of a slide without a
pyramid is built from strips of its level 0.
"""

import ctypes
import math
from pathlib import Path

import numpy as np
import openslide
from openslide import lowlevel
from PIL import Image

from data.coordinates import TileGrid, exact_downsamples
from data.fault import Fault

SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"}
LARGEST_READ = 2048  # pixels a side read at once for a thumbnail: 16 MB as RGBA
ISOTROPIC = 0.01


class Slide:
    """One open slide. Use as a context manager; not to be shared between processes.

    ``cache`` is how many bytes of decoded pixels are kept for neighbouring tiles (openslide's own 32 MiB where it isn't given).
    Raises Fault where openslide cannot open the file.
    """

    def __init__(self, path: Path, cache: int | None = None) -> None:
        self.path = path
        try:
            self._reader = openslide.OpenSlide(path)
            if cache is not None:
                self._reader.set_cache(openslide.OpenSlideCache(cache))
        except (openslide.OpenSlideError, OSError) as error:
            folder = "it is a folder, name a slide in it" if path.is_dir() else ""
            reason = "no such file" if not path.exists() else folder or str(error) or type(error).__name__
            raise Fault(f"{path} cannot be read as a slide ({reason}): replace the file, or leave it out") from error
        self.dimensions: list[tuple[int, int]] = list(self._reader.level_dimensions)
        self.width, self.height = self.dimensions[0]
        self.downsamples = exact_downsamples(self.dimensions)
        self._stated_downsamples: list[float] = list(self._reader.level_downsamples)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    def mpp(self, fallback: float | None = None) -> float:
        """Microns per level-0 pixel, as the file states it, or ``fallback`` where it states none.

        Raises Fault where there is neither, and where x and y differ by more than 1 %.
        """
        stated = [
            _positive(self._reader.properties.get(name))
            for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
        ]
        across, down = stated
        if across is None or down is None:
            if fallback is None:
                raise Fault(
                    f"{self.path} does not say how many microns a pixel is wide: "
                    "give slides_mpp=0.25 (or whatever its scanner used), or leave this slide out"
                )
            return fallback
        if abs(across / down - 1) > ISOTROPIC:
            raise Fault(
                f"{self.path} has pixels of {across:.4g} × {down:.4g} µm, and pixels that are not square are not tiled: "
                "resave it with square pixels, or leave this slide out"
            )
        return math.sqrt(across * down)

    def read_tile(self, grid: TileGrid, x: int, y: int) -> np.ndarray:
        """The tile whose corner is at level-0 ``(x, y)``, uint8 (tile_size, tile_size, 3).

        Untouched pixels of ``grid.level`` where the grid does not resample; otherwise resized with antialiasing from exactly
        the tile's own (fractional) box. Raises Fault where the slide's data is damaged there.
        """
        tile = self.tile_pixels(grid, x, y)
        if tile.shape[2] == 3:
            return tile
        rgb = np.empty((*tile.shape[:2], 3), dtype=np.uint8)
        for channel in range(3):  # a channel at a time is four times faster than all of them turned round
            rgb[..., channel] = tile[..., 2 - channel]
        return rgb

    def tile_pixels(self, grid: TileGrid, x: int, y: int) -> np.ndarray:
        """`read_tile` for an encoder that takes pixels as openslide has them: where nothing is resized uint8 (tile_size, tile_size, 4),
        blue, green, red and a byte that says nothing."""
        left, top, side = grid.level_box(x, y)
        first_column, first_row = math.floor(left), math.floor(top)
        width = math.ceil(left + side - 1e-6) - first_column
        height = math.ceil(top + side - 1e-6) - first_row
        region = self._read(grid.level, first_column, first_row, width, height)
        if not grid.resampled:
            return region
        box = (left - first_column, top - first_row, left - first_column + side, top - first_row + side)
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
        return np.array(_picture(region).resize((grid.tile_size, grid.tile_size), Image.Resampling.BICUBIC, box=box))

    def thumbnail(self, downsample: float) -> np.ndarray:
        """The whole slide, ``downsample`` level-0 pixels to a pixel, area-averaged: uint8 (H, W, 3).

        H and W are ``ceil(height / downsample)`` and ``ceil(width / downsample)``; the last row and column may hang over.
        """
        level = max((i for i, d in enumerate(self.downsamples) if d <= downsample * 1.001), default=0)
        scale = downsample / self.downsamples[level]  # level pixels per thumbnail pixel
        width, height = math.ceil(self.width / downsample), math.ceil(self.height / downsample)
        step = max(1, math.floor(LARGEST_READ / scale))
        thumbnail = np.empty((height, width, 3), dtype=np.uint8)
        for row in range(0, height, step):
            for column in range(0, width, step):
                rows, columns = min(step, height - row), min(step, width - column)
                left, top = math.floor(column * scale), math.floor(row * scale)
                region_width, region_height = math.ceil(columns * scale) + 1, math.ceil(rows * scale) + 1
                region = self._read(level, left, top, region_width, region_height)
                x0, y0 = column * scale - left, row * scale - top
                box = (x0, y0, min(x0 + columns * scale, region_width), min(y0 + rows * scale, region_height))
                block = _picture(region).resize((columns, rows), Image.Resampling.BOX, box=box)
                thumbnail[row : row + rows, column : column + columns] = np.asarray(block)
        return thumbnail

    def _read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Pixels of one level, ``left`` and ``top`` in that level's pixels: uint8 (height, width, 4), blue, green, red and a byte that says
        nothing. Where the slide holds nothing, white.

        openslide takes the corner in whole level-0 pixels, so at a level with a fractional downsample the corner may be off by
        half a level-0 pixel.
        """
        stated = self._stated_downsamples[level]
        pixels = np.empty((height, width), dtype=np.uint32)  # alpha, red, green, blue, premultiplied
        try:
            # What `OpenSlide.read_region` calls, before it makes a picture of the result, which costs as much as half of a JPEG's encoding.
            lowlevel._read_region(
                self._reader._osr, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32)), round(left * stated), round(top * stated),
                level, width, height,
            )  # fmt: skip
        except openslide.OpenSlideError as error:
            raise Fault(f"{self.path} is damaged near level {level}, pixel ({left}, {top}): {error}") from error
        found = pixels.astype("<u4", copy=False).view(np.uint8).reshape(height, width, 4)
        if np.bitwise_and.reduce(pixels, axis=None) >> 24 != 255:
            found[..., :3] += 255 - found[..., 3:]
        return found


def _picture(pixels: np.ndarray) -> Image.Image:
    """What `Slide._read` gives as an RGB picture."""
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.data, "raw", "BGRX")


def list_slides(named: list[str]) -> list[Path]:
    """Slide files, sorted and without repeats, from paths, folders (searched through), globs, and ``.txt`` lists of these.

    In a folder, files with an ending that openslide knows are slides, and the ``.dcm`` files of one folder are one slide.
    Raises Fault for a name that leads to nothing.
    """
    found: set[Path] = set()
    for name in named:
        path = Path(name).expanduser()
        if path.suffix == ".txt":
            if not path.is_file():
                raise Fault(f"there is no list of slides at {path}")
            lines = [line.strip() for line in path.read_text().splitlines()]
            found.update(list_slides([line for line in lines if line and not line.startswith("#")]))
        elif path.is_dir():
            inside = _slides_in(path)
            if not inside:
                endings = " ".join(sorted(SUFFIXES))
                raise Fault(f"the folder {path} holds no slide (files ending in {endings})")
            found.update(inside)
        elif path.is_file():
            found.add(path.resolve())
        else:
            matches = [
                match for match in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))) if match.is_file()
            ]
            if not matches:
                raise Fault(f"there is no slide at {path}")
            found.update(match.resolve() for match in matches)
    return sorted(found)


def _slides_in(folder: Path) -> list[Path]:
    slides: list[Path] = []
    dicom_folders: set[Path] = set()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        if path.suffix.lower() == ".dcm":
            if path.parent in dicom_folders:
                continue
            dicom_folders.add(path.parent)
        slides.append(path.resolve())
    return slides


def _positive(text: str | None) -> float | None:
    """A property as a positive number; None where it is missing, not a number, or zero (all of these are met in files)."""
    try:
        value = float(text) if text is not None else 0.0
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
