"""What on a slide is tissue: rules from an RGB thumbnail to a mask, by name.

Every rule is one function on a thumbnail (H, W, 3) uint8 → bool mask (H, W), True where there is tissue. To add one,
write the function and put a line in `TISSUE_RULES`; one of your own, a trained network say, is a class derived from
`TissueRule` in a file of yours. `otsu` is the default: permissive about faint tissue, strict about pen.
"""

import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from data.fault import Fault


class TissueRule(ABC):
    """Tells tissue on a thumbnail; the same in any process, to which it is sent pickled."""

    mpp: float  # microns per pixel of the thumbnail it judges; a very large slide gets a coarser one
    min_tissue: float  # least share of a tile that must be tissue
    rejects_pen: bool = False
    level: float | None = None  # in place of mpp: it judges the slide's coarsest level of at most this downsample

    @abstractmethod
    def mask(self, rgb: np.ndarray) -> np.ndarray:
        """Where there is tissue: uint8 (H, W, 3) → bool (H, W)."""


@dataclass(frozen=True)
class FunctionRule(TissueRule):
    """A mask function and what belongs to it."""

    of: Callable[[np.ndarray], np.ndarray]
    mpp: float
    min_tissue: float
    rejects_pen: bool = False
    level: float | None = None

    def mask(self, rgb: np.ndarray) -> np.ndarray:
        return self.of(rgb)


class TissueNeeded(NamedTuple):
    """The least share of a tile that must be tissue by a rule, which is ``called`` by its name, or is a user's class
    with its settings."""

    called: str | dict[str, Any]
    rule: TissueRule
    share: float

    def mask(self, rgb: np.ndarray, slide: str) -> np.ndarray:
        """The rule's mask of the thumbnail of ``slide``. Raises Fault where a user's rule gives none, or fails."""
        try:
            given = self.rule.mask(rgb)
        except Exception as error:
            if isinstance(self.called, str):
                raise  # a rule of ours: a defect keeps its traceback
            said = " ".join("".join(traceback.format_exception_only(error)).split())
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise Fault(
                f"tissue={self.called} fails on a thumbnail of {slide}: {said} ({Path(at.filename).name}:{at.lineno})"
            ) from error
        try:
            mask = np.asarray(given)
            found = f"{mask.dtype} {mask.shape}"
        except ValueError:
            mask, found = None, f"a {type(given).__name__} that is no array"
        if mask is None or mask.shape != rgb.shape[:2] or mask.dtype != np.bool_:
            raise Fault(
                f"tissue={self.called}: its mask of a thumbnail of {slide}, {rgb.shape[0]}×{rgb.shape[1]} pixels, is"
                f" {found}; it must be bool, a value for each pixel."
            )
        return mask


def otsu(rgb: np.ndarray) -> np.ndarray:
    """Otsu's threshold on luminance, without grey background and without pen.

    Otsu's threshold (1979) splits a histogram in two whatever is in it: on a field without glass it cuts through the
    tissue, on a nearly empty slide through the glass. So it is held between 88 and 94 % of the glass, taken as the
    thumbnail's 99th percentile. What is neither coloured nor dark (shadows, dust, the seams of a scanner) is
    background.
    """
    luminance = _mean(rgb)
    glass = float(np.percentile(luminance, 99))
    threshold = float(np.clip(_threshold(luminance), 0.88 * glass, 0.94 * glass))
    coloured = (_chroma(rgb) > 14) | (luminance < 0.5 * glass)
    ink = pen(rgb)
    return _closed(_without_specks((luminance < threshold) & coloured & ~ink), np.ones((3, 3))) & ~ink


def gigapath(rgb: np.ndarray) -> np.ndarray:
    """Prov-GigaPath's rule: the channels' mean below its own Otsu threshold (Xu et al. 2024, Methods)."""
    luminance = _mean(rgb)
    return luminance < _threshold(luminance)


def clam(rgb: np.ndarray) -> np.ndarray:
    """CLAM's preset (Lu et al. 2021): saturation above 8 after a 7 px median, closed with a 4 px square, on the level
    that CLAM takes.

    A tile is kept where any of this touches it. CLAM then drops contours smaller than 100 patches of 512 px, which
    would drop every biopsy, lays a grid of its own into each contour, and keeps a patch where one of four points around
    its centre is inside: none of this is done here, as CLAM's own tiles can be had with ``coordinates=``.
    """
    # The median of 49 values is above 8 where most of them are: counting is twenty times faster than sorting.
    above = ndimage.uniform_filter((_hsv(rgb)[..., 1] > 8).astype(np.float32), size=7) > 0.5
    return _closed(above, np.ones((4, 4)))


def hsv(rgb: np.ndarray) -> np.ndarray:
    """Hue 90–180, saturation 8–255, value 103–255 on OpenCV's scales (hue 0–180): blue, purple, pink and red."""
    hue, saturation, value = np.moveaxis(_hsv(rgb), 2, 0)
    return (hue >= 90) & (saturation >= 8) & (value >= 103)


# For rules that their authors apply to the tile's own pixels: the finest that scanners have, so that only a slide of
# more than `data.slides.tiling.LARGEST_MASK` pixels a side is judged more coarsely.
FULL = 0.1

TISSUE_RULES: dict[str, TissueRule] = {
    "otsu": FunctionRule(otsu, mpp=8.0, min_tissue=0.25, rejects_pen=True),
    "gigapath": FunctionRule(gigapath, mpp=2.0, min_tissue=0.1),
    "clam": FunctionRule(clam, mpp=FULL, min_tissue=1e-6, level=64),
    "hsv": FunctionRule(hsv, mpp=FULL, min_tissue=0.6),
}


def tissue_needed(names: Sequence[str], shares: Sequence[float] | None = None) -> tuple[TissueNeeded, ...]:
    """Rules of `TISSUE_RULES` with the least share of each; None: their own."""
    rules = [TISSUE_RULES[name] for name in names]
    own = [rule.min_tissue for rule in rules] if shares is None else shares
    return tuple(map(TissueNeeded, names, rules, own))


def pen(rgb: np.ndarray) -> np.ndarray:
    """Green, blue, red and black ink, (H, W, 3) uint8 → bool (H, W).

    Haematoxylin and eosin absorb green most: in stained tissue, however dark, the green channel is the lowest (hues
    from violet through pink). Ink breaks that order. Green and blue ink absorb red most; red ink absorbs blue as much
    as green, and far more of both than eosin does; black ink is dark without a hue.
    """
    red, green, blue = (ndimage.uniform_filter(channel, size=3, output=np.float32) for channel in _channels(rgb))
    brightest = np.maximum(np.maximum(red, green), blue)
    chroma = brightest - np.minimum(np.minimum(red, green), blue)
    green_or_blue = (red < green - 8) & (chroma > 25)
    solid_red = (red > 110) & (np.maximum(green, blue) < 0.45 * red) & (blue - green < 0.14 * red)
    faint_red = (red > 150) & (np.maximum(green, blue) < 0.80 * red) & (blue - green < 0.03 * red)
    black = (brightest < 115) & (chroma < 36)
    ink = _without_specks(green_or_blue | solid_red | faint_red | black)
    return ndimage.binary_dilation(ink, iterations=1)


def is_fluorescence(rgb: np.ndarray) -> bool:
    """True for a dark field with sparse light: over half of the thumbnail near black, hardly anything near white.

    Black filling around a bright-field scan does not count, as the scan's glass is bright.
    """
    red, green, blue = _channels(rgb)
    dark = float((np.maximum(np.maximum(red, green), blue) < 45).mean())
    bright = float((np.minimum(np.minimum(red, green), blue) > 170).mean())
    return dark > 0.5 and bright < 0.02


def is_empty(tile: np.ndarray) -> bool:
    """True for a tile (H, W, 3 or more) uint8 with nothing in it: flat (mean standard deviation of the channels under
    5), or more than half of it pure black or pure white, as missing data reads. Judged on every fourth pixel.

    The limits are those of Prov-GigaPath's empty-tile check.
    """
    sample = np.ascontiguousarray(tile[::4, ::4]).reshape(-1, tile.shape[2])
    count = len(sample)
    red, green, blue = channels = [
        sample[:, channel].astype(np.int32) for channel in range(3)
    ]  # whole numbers: sums are exact
    spread = sum(math.sqrt(count * int((c * c).sum()) - int(c.sum()) ** 2) for c in channels) / (3 * count)
    colours = red | green << 8 | blue << 16
    missing = max(np.count_nonzero(colours == 0), np.count_nonzero(colours == 0xFFFFFF)) > count / 2
    return bool(spread < 5 or missing)


SATURATED = 0.07  # saturation, of 1, above which a pixel is coloured: nanopath's (MedARC, dataloader.py)


def saturated_share(tile: np.ndarray) -> float:
    """The share of a tile's pixels, uint8 (H, W, 3 or more), whose saturation in HSV is above `SATURATED`."""
    red, green, blue = (np.ascontiguousarray(tile[..., channel]) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = (value - np.minimum(np.minimum(red, green), blue)).astype(np.uint16)
    return float((100 * chroma > round(100 * SATURATED) * value.astype(np.uint16)).mean())


def covered_shares(mask: np.ndarray, left: np.ndarray, top: np.ndarray, side: float) -> np.ndarray:
    """Share of each square that is True in ``mask``: squares with corners at columns ``left`` and rows ``top`` (both
    float, in mask pixels) and ``side`` mask pixels wide → float32 (len(top), len(left)), from one summed-area table."""
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), dtype=np.int64)
    table[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    x0, x1 = _edges(left, side, mask.shape[1])
    y0, y1 = _edges(top, side, mask.shape[0])
    inside = table[y1][:, x1] - table[y0][:, x1] - table[y1][:, x0] + table[y0][:, x0]
    return (inside / np.outer(y1 - y0, x1 - x0)).astype(np.float32)


def _edges(start: np.ndarray, side: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.clip(np.round(start).astype(np.int64), 0, limit - 1)
    last = np.clip(np.round(start + side).astype(np.int64), first + 1, limit)
    return first, last


def _threshold(luminance: np.ndarray) -> float:
    """Otsu's threshold; a flat image has none, and then nothing is darker than it."""
    return float(threshold_otsu(luminance)) if luminance.min() < luminance.max() else float(luminance.min())


def _channels(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) → (3, H, W), contiguous: on planes everything below is several times faster than along an axis of
    three."""
    return np.ascontiguousarray(np.moveaxis(rgb, 2, 0))


def _mean(rgb: np.ndarray) -> np.ndarray:
    return _channels(rgb).sum(axis=0, dtype=np.uint16) / 3.0


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """Highest minus lowest channel, uint8."""
    red, green, blue = _channels(rgb)
    return np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)


def _hsv(rgb: np.ndarray) -> np.ndarray:
    """RGB uint8 → hue 0–180, saturation 0–255, value 0–255, uint8 (OpenCV's scales)."""
    red, green, blue = _channels(rgb.astype(np.float32))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.where(
        value == red, (green - blue) / safe, np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    hue = np.where(chroma > 0, (30 * hue) % 180, 0)
    saturation = np.where(value > 0, 255 * chroma / np.maximum(value, 1), 0)
    return np.round(np.stack([hue, saturation, value], axis=2)).astype(np.uint8)


def _closed(mask: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Morphological closing that does not eat the border: the mask is continued beyond it."""
    margin = len(square)
    return ndimage.binary_closing(np.pad(mask, margin, mode="edge"), square)[margin:-margin, margin:-margin]


def _without_specks(mask: np.ndarray, pixels: int = 9) -> np.ndarray:
    """Drop connected pieces of fewer than ``pixels`` pixels."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= pixels)[labels]
