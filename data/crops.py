"""Cutting a tile into views: a few large crops and several small ones, antialiased, as uint8.

The loader only cuts; colour and blur run batched on the device (`data.augment`), because there they cost a tenth.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.keyed import rng


@dataclass(frozen=True)
class CropSizes:
    """Numbers, sides (pixels) and ranges of the two kinds of crop.

    A ``scale`` is a range of areas, as shares of the tile's; with ``relative_to="crop"`` it is a range of sides, as multiples
    of the crop's own: extended-context translation (Virchow2), which moves over a large tile and hardly resizes.
    """

    global_count: int
    global_size: int
    global_scale: tuple[float, float]
    local_count: int
    local_size: int
    local_scale: tuple[float, float]
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    relative_to: str = "tile"
    vertical_flip: float = 0.0  # probability; left to right it is a half

    def areas(self, side: int, scale: tuple[float, float], height: int, width: int) -> tuple[float, float]:
        """The range of areas of a view of ``side`` pixels in a tile of ``height`` × ``width``, as shares of the tile's."""
        if self.relative_to == "tile":
            return scale
        return (scale[0] * side) ** 2 / (height * width), (scale[1] * side) ** 2 / (height * width)

    def views(self) -> list[tuple[int, tuple[float, float]]]:
        """``(side, scale)`` of every view, the global ones first."""
        return [(self.global_size, self.global_scale)] * self.global_count + [
            (self.local_size, self.local_scale)
        ] * self.local_count


def box(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], draw: np.random.Generator
) -> tuple[int, int, int, int]:
    """``(top, left, height, width)`` in pixels of a random resized crop, by torchvision's rule.

    Ten tries at an area uniform in ``scale`` and an aspect ratio log-uniform in ``aspect``; failing that, the largest
    central crop of an allowed aspect.
    """
    areas = height * width * draw.uniform(*scale, size=10)
    aspects = np.exp(draw.uniform(math.log(aspect[0]), math.log(aspect[1]), size=10))
    for area, ratio in zip(areas, aspects, strict=True):
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw.integers(0, height - h + 1)), int(draw.integers(0, width - w + 1)), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = (width, round(width / ratio)) if width / height < aspect[0] else (round(height * ratio), height)
    w, h = min(w, width), min(h, height)
    return (height - h) // 2, (width - w) // 2, h, w


def cut(tile: np.ndarray, sizes: CropSizes, seed: int, sample: int) -> list[Tensor]:
    """Cut every view of one tile: uint8 ``(H, W, 3)`` → a list of uint8 tensors ``(3, side, side)``.

    Boxes and mirroring (half of the views left to right, some top to bottom) depend on ``(seed, sample)`` alone; ``sample`` is the tile's
    position in the run. Bicubic with antialiasing, on bytes, as DINOv2's views are.
    """
    draw = rng(seed, "crops", sample)
    image = torch.from_numpy(tile).permute(2, 0, 1).unsqueeze(0)  # channels-last bytes: torch's fast path
    views = []
    for side, scale in sizes.views():
        areas = sizes.areas(side, scale, tile.shape[0], tile.shape[1])
        top, left, h, w = box(tile.shape[0], tile.shape[1], areas, sizes.aspect, draw)
        view = F.interpolate(image[..., top : top + h, left : left + w], (side, side), mode="bicubic", antialias=True)
        if draw.random() < 0.5:
            view = view.flip(-1)
        if sizes.vertical_flip and draw.random() < sizes.vertical_flip:
            view = view.flip(-2)
        views.append(view[0])
    return views
