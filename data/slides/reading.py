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

from data.fault import Fault
from data.git_lfs import refuse_pointer
from data.slides.coordinates import TileGrid, exact_downsamples
from data.slides.mpp import COARSEST, FINEST, ISOTROPIC

READS_INTO_OUR_MEMORY = hasattr(lowlevel, "_read_region")
"""Whether this openslide-python still has, unpromised, what its ``read_region`` calls before it makes a picture of the
result, which costs as much as half of a JPEG's encoding."""
LARGEST_READ = 2048  # pixels a side read at once for a thumbnail: 16 MB as RGBA
MPP_TIMES_POWER = 10.0  # 40× is about 0.25 µm, whoever made the scanner
FAR = 2.5  # some 20× scanners have pixels of 0.22 µm, a factor of 2.3; centimetres taken for inches are one of 2.54


class Slide:
    """One open slide. Use as a context manager; not to be shared between processes.

    ``cache`` is how many bytes of decoded pixels are kept for neighbouring tiles (openslide's own 32 MiB where it isn't
    given). Raises Fault where openslide cannot open the file.
    """

    def __init__(self, path: Path, cache: int | None = None) -> None:
        self.path = path
        try:
            self._reader = _opened(path)
            if cache is not None:
                self._reader.set_cache(openslide.OpenSlideCache(cache))
        except (openslide.OpenSlideError, OSError) as error:
            if path.is_file():
                refuse_pointer(path)
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

    def mpp(self, overrule: float | None = None) -> float:
        """Microns per level-0 pixel: ``overrule`` where the user says so, or else what the file states.

        Raises Fault where there is neither; where x and y differ by more than 1 %; and where no scanner could have made
        what is stated: finer than 0.05, coarser than 10, or far from what the objective's power goes with (10 µm over
        the power).
        """
        if overrule is not None:
            return overrule
        ways_out = "give slides_mpp=0.25 (or whatever its scanner used), or leave this slide out"
        across, down = self._stated_mpp()
        if across is None or down is None:
            raise Fault(f"{self.path} does not say how many microns a pixel is wide: {ways_out}")
        if abs(across / down - 1) > ISOTROPIC:
            raise Fault(
                f"{self.path} has pixels of {across:.4g} × {down:.4g} µm, and pixels that are not square are not tiled:"
                " resave it with square pixels, give slides_mpp= if that is wrong, or leave this slide out"
            )
        mpp = math.sqrt(across * down)
        if not FINEST <= mpp <= COARSEST:
            raise Fault(f"{self.path} says that a pixel is {mpp:.4g} µm wide, which no slide's is: {ways_out}")
        power = _positive(self._reader.properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
        if power is not None and not 1 / FAR < mpp * power / MPP_TIMES_POWER < FAR:
            raise Fault(
                f"{self.path} says that a pixel is {mpp:.4g} µm wide and that its objective is {power:g}×, which goes"
                f" with about {MPP_TIMES_POWER / power:.2g} µm: {ways_out}"
            )
        return mpp

    def overruled(self, mpp: float | None) -> str:
        """A sentence where the user's ``mpp`` counts instead of another that the file states, or nothing."""
        across, _ = self._stated_mpp()
        if mpp is None or across is None or abs(across / mpp - 1) <= ISOTROPIC:
            return ""
        return f"{self.path} says {across:.4g} µm per pixel, and slides_mpp={mpp:g} overrules that"

    def _stated_mpp(self) -> tuple[float | None, float | None]:
        properties = self._reader.properties
        return _positive(properties.get(openslide.PROPERTY_NAME_MPP_X)), _positive(
            properties.get(openslide.PROPERTY_NAME_MPP_Y)
        )

    def read_tile(self, grid: TileGrid, x: int, y: int) -> np.ndarray:
        """The tile whose corner is at level-0 ``(x, y)``, uint8 (tile_size, tile_size, 3).

        Untouched pixels of ``grid.level`` where the grid does not resample; otherwise resized with antialiasing from
        exactly the tile's own (fractional) box. Raises Fault where the slide's data is damaged there.
        """
        tile = self.tile_pixels(grid, x, y)
        if tile.shape[2] == 3:
            return tile
        rgb = np.empty((*tile.shape[:2], 3), dtype=np.uint8)
        for channel in range(3):  # a channel at a time is four times faster than all of them turned round
            rgb[..., channel] = tile[..., 2 - channel]
        return rgb

    def tile_pixels(self, grid: TileGrid, x: int, y: int) -> np.ndarray:
        """`read_tile` for an encoder that takes pixels as openslide has them: where nothing is resized uint8
        (tile_size, tile_size, 4), blue, green, red and a byte that says nothing."""
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

        H and W are ``ceil(height / downsample)`` and ``ceil(width / downsample)``; the last row and column may hang
        over.
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
        """Pixels of one level, ``left`` and ``top`` in that level's pixels: uint8 (height, width, 4), blue, green, red
        and a byte that says nothing. Where the slide holds nothing, white.

        openslide takes the corner in whole level-0 pixels, so at a level with a fractional downsample the corner may be
        off by half a level-0 pixel.
        """
        stated = self._stated_downsamples[level]
        corner = round(left * stated), round(top * stated)
        pixels = np.empty((height, width), dtype=np.uint32)  # alpha, red, green, blue, premultiplied
        try:
            if READS_INTO_OUR_MEMORY:
                into = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
                lowlevel._read_region(self._reader._osr, into, *corner, level, width, height)
            else:
                return _on_white(self._reader.read_region(corner, level, (width, height)))
        except openslide.OpenSlideError as error:
            raise Fault(f"{self.path} is damaged near level {level}, pixel ({left}, {top}): {error}") from error
        found = pixels.astype("<u4", copy=False).view(np.uint8).reshape(height, width, 4)
        if np.bitwise_and.reduce(pixels, axis=None) >> 24 != 255:
            found[..., :3] += 255 - found[..., 3:]
        return found


def _on_white(found: Image.Image) -> np.ndarray:
    """What `Slide._read` gives, of what openslide-python makes of a region: RGBA, not premultiplied."""
    pixels = np.asarray(found)
    share = pixels[..., 3:].astype(np.uint16)
    on_white = (pixels[..., :3] * share + 255 * (255 - share) + 127) // 255
    return np.concatenate([on_white[..., ::-1], pixels[..., 3:]], axis=2).astype(np.uint8)


def _opened(path: Path) -> openslide.OpenSlide:
    """The slide at a path, or at what a link there leads to: the files that belong to it lie beside the one or the
    other."""
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError:
        if not path.is_symlink() or not path.exists():
            raise
        return openslide.OpenSlide(path.resolve())


def _picture(pixels: np.ndarray) -> Image.Image:
    """What `Slide._read` gives as an RGB picture."""
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.data, "raw", "BGRX")


def _positive(text: str | None) -> float | None:
    """A property as a positive number; None where it is missing, not a number, or zero (all of these are met in
    files)."""
    try:
        value = float(text) if text is not None else 0.0
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
