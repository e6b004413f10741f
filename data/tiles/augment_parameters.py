"""What a view's colour, blur and solarisation are drawn from, and the rows of numbers that are drawn.

The loader draws a row for each view, keyed by the tile's position in the run (`draw_parameters`); `data.tiles.augment` applies
them on the device.
"""

from dataclasses import dataclass

import numpy as np

# Columns of a parameter row.
ORDER = slice(0, 4)  # the order of brightness, contrast, saturation and hue
FACTORS = slice(4, 8)  # their factors; hue in turns
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER, GREY, SIGMA, SOLARISE = 8, 9, 10, 11
"""Whether to jitter, whether to grey, the blur's sigma in pixels (0: none), whether to solarise."""
STAIN, STAINS, SCALES, WIDTH = 12, slice(13, 16), slice(16, 19), 19
"""Whether to shift the stains, by how much, and what they are multiplied by before: haematoxylin, eosin, DAB."""

PLAIN = 3
"""The kind of view that keeps its colours."""

BLUR_TAPS = 9
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision has it
SOLARISE_FROM = 128 / 255


@dataclass(frozen=True)
class Colour:
    """Strengths and probabilities. Stains are shifted by up to ``stain_shift`` either way: see
    `data.tiles.augment.shift_stains`; with a ``stain_sigma`` by a normal number of that deviation, and multiplied by one
    around 1 (nanopath's HED jitter), both of each stain's own. Blur and solarisation are given per kind of view: first global, other globals,
    local.

    DINOv2's configuration gives blur probabilities of 1, .1 and .5, but its code applies ``1 − p``; these are the
    probabilities with which a view *is* blurred: 0, .9 and .5 trained the released models.
    """

    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey_probability: float = 0.2
    blur_probability: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_probability: tuple[float, float, float] = (0.0, 0.2, 0.0)
    stain_probability: float = 0.0
    stain_shift: float = 0.0
    stain_sigma: float = 0.0


def draw_parameters(colour: Colour, kinds: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Parameter rows ``(views, WIDTH)`` float32 of a tile's views, whose ``kinds`` ``(views,)`` are 0 (first global), 1
    (other globals), 2 (local) or `PLAIN`, which keep their colours."""
    coloured = kinds != PLAIN
    u = generator.random((len(kinds), 17))
    rows = np.empty((len(kinds), WIDTH), dtype=np.float32)
    rows[:, ORDER] = u[:, :4].argsort(1)
    strengths = np.array((colour.brightness, colour.contrast, colour.saturation))
    low, high = np.maximum(0.0, 1 - strengths), 1 + strengths
    rows[:, 4:7] = low + u[:, 4:7] * (high - low)
    rows[:, 7] = colour.hue * (2 * u[:, 7] - 1)
    rows[:, JITTER] = coloured & (u[:, 8] < colour.jitter_probability)
    rows[:, GREY] = coloured & (u[:, 9] < colour.grey_probability)
    sigma = colour.blur_sigma[0] + u[:, 10] * (colour.blur_sigma[1] - colour.blur_sigma[0])
    rows[:, SIGMA] = np.where(u[:, 11] < np.take((*colour.blur_probability, 0.0), kinds), sigma, 0.0)
    rows[:, SOLARISE] = u[:, 12] < np.take((*colour.solarise_probability, 0.0), kinds)
    rows[:, STAIN] = coloured & (u[:, 13] < colour.stain_probability)
    rows[:, STAINS], rows[:, SCALES] = colour.stain_shift * (2 * u[:, 14:] - 1), 1.0
    if colour.stain_sigma:
        normal = colour.stain_sigma * generator.standard_normal((2, len(kinds), 3))
        rows[:, STAINS] += normal[0]
        rows[:, SCALES] += normal[1]
    return rows
