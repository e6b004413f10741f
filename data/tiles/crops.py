"""Cutting a tile into views: a few large crops and several small ones, antialiased, as uint8.

The loader only cuts; colour and blur run batched on the device (`data.tiles.augment`), because there they cost a tenth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.keyed import rng
from data.tiles.augment_parameters import PLAIN


@dataclass(frozen=True)
class FurtherViews:
    """A kind of view that an objective wants beside global and local ones: how many of a tile, their side (pixels),
    their range of ``scale`` as in `CropSizes`. They are coloured as local views are.

    ``of_global``: they show what the global views show, one each, at another size and in the tile's own colours; there
    are as many as global views then, and ``scale`` isn't asked.
    """

    count: int
    size: int
    scale: tuple[float, float]
    of_global: bool = False


@dataclass(frozen=True)
class CropSizes:
    """Numbers, sides (pixels) and ranges of the kinds of crop: global, local, and those that an objective adds.

    A ``scale`` is a range of areas, as shares of the tile's; with ``relative_to="crop"`` it is a range of sides, as
    multiples of the crop's own: extended-context translation (Virchow2), which moves over a large tile and hardly
    resizes.
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
    quarter_turns: float = 0.0  # probability of a turn by 90, 180 or 270 degrees, equally likely
    further: tuple[FurtherViews, ...] = ()

    def areas(self, side: int, scale: tuple[float, float], height: int, width: int) -> tuple[float, float]:
        """The range of areas of a view of ``side`` pixels in a tile of ``height`` × ``width``, as shares of the
        tile's."""
        if self.relative_to == "tile":
            return scale
        return (scale[0] * side) ** 2 / (height * width), (scale[1] * side) ** 2 / (height * width)

    def kinds(self) -> np.ndarray:
        """``(views,)``: 0 for the first global view, 1 for other globals, 2 for local ones and further ones, `PLAIN` for
        what keeps its colours."""
        further = [PLAIN if views.of_global else 2 for views in self.further for _ in range(views.count)]
        return np.array([min(view, 1) for view in range(self.global_count)] + [2] * self.local_count + further)

    def twins(self) -> dict[int, int]:
        """Of each view that shows what a global one shows, that one's number."""
        found: dict[int, int] = {}
        number = self.global_count + self.local_count
        for views in self.further:
            found |= {number + i: i for i in range(views.count) if views.of_global}
            number += views.count
        return found

    def sides(self) -> list[tuple[int, int]]:
        """Number and side of the crops of each kind there is: global, local, further ones."""
        kinds = [(self.global_count, self.global_size), (self.local_count, self.local_size)]
        kinds += [(views.count, views.size) for views in self.further]
        return [(count, side) for count, side in kinds if count]

    def views(self) -> list[tuple[int, tuple[float, float]]]:
        """``(side, scale)`` of every view: global, local, further ones."""
        found = [(self.global_size, self.global_scale)] * self.global_count
        found += [(self.local_size, self.local_scale)] * self.local_count
        for views in self.further:
            found += [(views.size, views.scale)] * views.count
        return found


CROP_TRIES = 10
NUMBERS_A_CROP = (
    2 * CROP_TRIES + 5
)  # drawn for a view: for each try an area and an aspect, then two for the place, two for mirroring, a turn


def box(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], u: Sequence[float]
) -> tuple[int, int, int, int]:
    """``(top, left, height, width)`` in pixels of a random resized crop, by torchvision's rule.

    Ten tries at an area uniform in ``scale`` and an aspect ratio log-uniform in ``aspect``; failing that, the largest
    central crop of an allowed aspect. ``u`` are `NUMBERS_A_CROP` numbers uniform in [0, 1), the last three of them not
    used here.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for attempt in range(CROP_TRIES):
        area = height * width * (scale[0] + u[attempt] * (scale[1] - scale[0]))
        ratio = math.exp(low + u[CROP_TRIES + attempt] * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[-5] * (height - h + 1)), int(u[-4] * (width - w + 1)), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = (width, round(width / ratio)) if width / height < aspect[0] else (round(height * ratio), height)
    w, h = min(w, width), min(h, height)
    return (height - h) // 2, (width - w) // 2, h, w


def cut(tile: np.ndarray, sizes: CropSizes, seed: int, sample: int) -> list[Tensor]:
    """Cut every view of one tile: uint8 ``(H, W, 3)`` → a list of uint8 tensors ``(3, side, side)``.

    Boxes, mirroring (half of the views left to right, some top to bottom) and quarter turns after it depend on ``(seed,
    sample)`` alone; ``sample`` is the tile's position in the run. Bicubic with antialiasing, on bytes, as DINOv2's
    views are.
    """
    kinds = sizes.views()
    drawn = rng(seed, "crops", sample).random((len(kinds), NUMBERS_A_CROP)).tolist()
    image = torch.from_numpy(tile).permute(2, 0, 1).unsqueeze(0)  # channels-last bytes: torch's fast path
    height, width = tile.shape[:2]
    views = []
    twins = sizes.twins()
    for number, (side, _) in enumerate(kinds):
        like = twins.get(number, number)
        u, shown = drawn[like], sizes.areas(*kinds[like], height, width)
        top, left, h, w = box(height, width, shown, sizes.aspect, u)
        part = image.narrow(2, top, h).narrow(3, left, w)
        view = F.interpolate(part, (side, side), mode="bicubic", antialias=True)[0]
        flips = [axis for axis, share, number in ((2, 0.5, u[-3]), (1, sizes.vertical_flip, u[-2])) if number < share]
        view = view.flip(flips) if flips else view
        turned = u[-1] < sizes.quarter_turns
        views.append(view.rot90(1 + int(3 * u[-1] / sizes.quarter_turns), (1, 2)) if turned else view)
    return views
