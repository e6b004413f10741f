"""Colour, blur and solarisation, batched on the device with parameters of each image's own.

The loader draws the parameters (`data.tiles.augment_parameters`); the device applies them to a whole batch of uint8
crops at once. The order is DINOv2's: jitter (its four parts in an order of the image's own), grey, blur, solarise,
normalise; stains are shifted before them.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.fault import Fault
from data.fused import fusible
from data.on_device import on_device
from data.tiles.augment_parameters import (
    BLUR_TAPS,
    BRIGHTNESS,
    CONTRAST,
    FACTORS,
    GREY,
    HUE,
    JITTER,
    LUMA,
    ORDER,
    SATURATION,
    SCALES,
    SIGMA,
    SOLARISE,
    SOLARISE_FROM,
    STAIN,
    STAINS,
)

DARKEST = 1e-6  # transmitted light below which nothing is told apart; its logarithm is the unit of stains
# Absorption of red, green and blue by haematoxylin, eosin and DAB (Ruifrok & Johnston 2001).
STAIN_COLOURS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))

Planes = tuple[Tensor, Tensor, Tensor]
"""Red, green and blue of N images, ``(N, H · W)`` each, in (0, 1)."""


def augment(images: Tensor, parameters: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 ``(N, 3, H, W)`` → float32 of the same shape, augmented and normalised by ``mean`` and ``std`` ``(3,)``.

    ``parameters`` ``(N, WIDTH)`` stays on the CPU, so that choosing images costs the device no synchronisation. Raises
    Fault for images that are too small to be blurred.
    """
    rows = parameters.numpy()
    if min(images.shape[2:]) <= BLUR_TAPS // 2 and (rows[:, SIGMA] > 0).any():
        raise Fault(
            f"images of {images.shape[3]} × {images.shape[2]} px are too small for a blur of {BLUR_TAPS} taps: "
            "make the crops larger or set data.colour.blur_probability=[0,0,0]"
        )
    images = with_shifted_stains(images, rows)
    scale, offset = 1 / std, -mean / std
    if images.device.type == "cpu":
        from data.tiles.augment_cpu import augment_each  # numba compiles it here, which a run on GPUs has no use for

        result = torch.empty(images.shape)
        augment_each(images.contiguous().numpy(), rows, scale.numpy(), offset.numpy(), result.numpy())
        return result
    return augment_together(images, rows, scale, offset)


def with_shifted_stains(images: Tensor, rows: np.ndarray) -> Tensor:
    """Images ``(N, 3, H, W)`` in 0..255, those with shifted stains whose parameters ``(N, WIDTH)`` ask for it."""
    if (rows[:, STAIN] > 0).any():
        images = images.float()
        changes = rows[:, STAINS.start : SCALES.stop]
        _apply(images, rows[:, STAIN] > 0, lambda x, change: shift_stains(x / 255, *change.split(3, 1)) * 255, changes)
    return images


def augment_together(images: Tensor, rows: np.ndarray, scale: Tensor, offset: Tensor) -> Tensor:
    """Images ``(N, 3, H, W)`` in 0..255 by parameters ``(N, WIDTH)`` without the stains, times ``scale`` ``(3,)`` plus
    ``offset``.

    Every image goes through the same steps, with weights that make a step of its own order or leave the image as it is:
    nothing is sorted, and how many kernels run does not depend on what was drawn, but for blur and solarisation.
    """
    device = images.device
    blends, turns, contrast = (on_device(part, device) for part in _weights(rows))
    grey = on_device(rows[:, GREY], device)
    planes, level = to_contrast(images, blends[:, 0], turns[:, 0])
    planes = from_contrast(planes, level, contrast, blends[:, 1], turns[:, 1], grey)
    x = torch.stack(planes, 1).view(images.shape)
    _apply(x, rows[:, SIGMA] > 0, blur, rows[:, SIGMA])
    _apply(
        x, rows[:, SOLARISE] > 0, lambda part, _: torch.where(part >= SOLARISE_FROM, 1 - part, part), rows[:, SOLARISE]
    )
    return x.mul_(scale.view(3, 1, 1)).add_(offset.view(3, 1, 1))


def _weights(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an image does before and after its contrast: blends ``(N, 2, 4, 2)`` and turns of the hue ``(N, 2)``, and
    the contrast ``(N,)``.

    Brightness and saturation each have a blend of their own among two before the hue and two behind it, the others
    leave the image as it is: so every order of the four parts is the same steps.
    """
    images, place = np.arange(len(rows)), rows[:, ORDER].argsort(1)
    factors = np.where(rows[:, JITTER, None] > 0, rows[:, FACTORS], np.array((1, 1, 1, 0), dtype=np.float32))
    blends, turns = np.zeros((len(rows), 2, 4, 2), dtype=np.float32), np.zeros((len(rows), 2), dtype=np.float32)
    blends[..., 0] = 1
    for part, other in ((BRIGHTNESS, SATURATION), (SATURATION, BRIGHTNESS)):
        later = (place[:, [part]] > place[:, [CONTRAST, HUE, other]]).astype(int)
        factor = factors[:, part]
        grey = 1 - factor if part == SATURATION else np.zeros_like(factor)
        blends[images, later[:, 0], 2 * later[:, 1] + later[:, 2]] = np.stack([factor, grey], 1)
    turns[images, (place[:, HUE] > place[:, CONTRAST]).astype(int)] = factors[:, HUE]
    return blends, turns, factors[:, CONTRAST]


@fusible
def to_contrast(images: Tensor, blends: Tensor, turns: Tensor) -> tuple[Planes, Tensor]:
    """Bytes ``(N, 3, H, W)`` → what contrast is applied to, in (0, 1), and the mean ``(N,)`` of its luma."""
    red, green, blue = (plane.float() * (1 / 255) for plane in images.flatten(2).unbind(1))
    planes = _between((red, green, blue), blends, turns)
    return planes, luma(planes).mean(1)


@fusible
def from_contrast(
    planes: Planes, level: Tensor, contrast: Tensor, blends: Tensor, turns: Tensor, grey: Tensor
) -> Planes:
    """Contrast by f, ``f · x + (1 − f) · level``, what comes after it, and grey where asked (``grey`` ``(N,)`` not
    0)."""
    factor, rest = contrast.view(-1, 1), ((1 - contrast) * level).view(-1, 1)
    red, green, blue = ((factor * plane + rest).clamp(0, 1) for plane in planes)
    red, green, blue = _between((red, green, blue), blends, turns)
    one, no_colour = luma((red, green, blue)), grey.view(-1, 1) > 0
    return torch.where(no_colour, one, red), torch.where(no_colour, one, green), torch.where(no_colour, one, blue)


def _between(planes: Planes, blends: Tensor, turns: Tensor) -> Planes:
    """Two blends, a turn of the hue, two blends: weights ``(N, 4, 2)`` and turns ``(N,)``."""
    first, second, third, fourth = blends.unbind(1)
    planes = hue(blend(blend(planes, first), second), turns)
    return blend(blend(planes, third), fourth)


def luma(planes: Planes) -> Tensor:
    """Grey ``(N, H · W)``, by ITU-R 601."""
    red, green, blue = planes
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def blend(planes: Planes, weights: Tensor) -> Planes:
    """``factor · x + grey · luma(x)``, clipped to (0, 1): brightness by f is (f, 0), saturation (f, 1 − f); weights
    ``(N, 2)``."""
    factor, grey = weights[:, :1], weights[:, 1:] * luma(planes)
    red, green, blue = ((factor * plane + grey).clamp(0, 1) for plane in planes)
    return red, green, blue


def hue(planes: Planes, turns: Tensor) -> Planes:
    """Rotate the hue of HSV by ``turns`` ``(N,)``: exact, and without a choice for each pixel. No turn changes nothing
    at all.

    With green and blue sorted, then red and the larger of them, the hue in sixths of a turn is ``|k + (other − smaller)
    / chroma|``, where k is 0, −6, −2 or 4 as they lay. A channel is then ``value − chroma · f``: f = 1 within a sixth
    of a turn of the channel's opposite hue, falling to 0 at a third; the distance of two angles a, b on the circle is
    ``3 − ||a − b| − 3|``.
    """
    red, green, blue = planes
    turn = turns.view(-1, 1)
    larger, smaller = torch.maximum(green, blue), torch.minimum(green, blue)
    value, other = torch.maximum(red, larger), torch.minimum(red, larger)
    chroma = value - torch.minimum(other, smaller)
    k = torch.where(larger > red, torch.where(blue > green, 4.0, -2.0), torch.where(blue > green, -6.0, 0.0))
    sixths = (k + (other - smaller) / chroma.clamp(min=1e-12)).abs()

    def turned(channel: Tensor, opposite: float) -> Tensor:
        share = (((sixths - (opposite - 6 * turn).remainder(6)).abs() - 3).abs() - 1).clamp(0, 1)
        return torch.where(turn == 0, channel, value - chroma * share)

    return turned(red, -3.0), turned(green, -1.0), turned(blue, 1.0)


def shift_stains(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Multiply the amounts of haematoxylin, eosin and DAB by ``scale`` ``(N, 3)``, and add ``shift``: the HED
    perturbation of Midnight and OpenMidnight, whose scale is 1, and of nanopath.

    Beer-Lambert: ``log x / log 1e-6 = stains · colours``, per pixel; stains are clipped to (0, 1) after the shift, as
    OpenMidnight does (scikit-image's ``rgb2hed`` and ``hed2rgb``, Ruifrok & Johnston 2001).
    """
    unit, colours = math.log(DARKEST), torch.tensor(STAIN_COLOURS)
    to_stains, to_light = (on_device(part, x.device) for part in (torch.linalg.inv(colours).T / unit, colours.T * unit))
    return _shifted(x, shift, scale, to_stains, to_light)


@fusible
def _shifted(x: Tensor, shift: Tensor, scale: Tensor, to_stains: Tensor, to_light: Tensor) -> Tensor:
    pixels = x.clamp(min=DARKEST).log_().flatten(2)
    stains = (to_stains @ pixels).clamp_(min=0).mul_(scale.view(-1, 3, 1)).add_(shift.view(-1, 3, 1)).clamp_(0, 1)
    return (to_light @ stains).exp_().clamp_(0, 1).view(x.shape)


@fusible
def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of nine taps with a sigma (pixels) ``(N, 1, 1, 1)`` per image, reflected at the border: columns, then
    rows, as sums of shifted images."""
    reach = BLUR_TAPS // 2
    taps = torch.exp(-0.5 * (torch.arange(reach + 1, device=x.device) / sigma) ** 2)
    middle, *others = (taps / (2 * taps.sum(-1, keepdim=True) - 1)).split(1, -1)  # from the middle outwards
    x = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    for axis in (2, 3):
        length = x.shape[axis] - 2 * reach
        found = middle * x.narrow(axis, reach, length)
        for step, weight in enumerate(others, start=1):
            found += weight * (x.narrow(axis, reach - step, length) + x.narrow(axis, reach + step, length))
        x = found
    return x


def _apply(x: Tensor, chosen: np.ndarray, part: Callable[[Tensor, Tensor], Tensor], values: np.ndarray) -> None:
    """``x[chosen] ← part(x[chosen], values[chosen])`` in place; ``values`` arrive as ``(n, 1, 1, 1)``, stains as
    ``(n, 3, 1, 1)``."""
    numbers = np.flatnonzero(chosen)
    if len(numbers):
        of_them, where = (
            on_device(array, x.device) for array in (values[numbers].reshape(len(numbers), -1, 1, 1), numbers)
        )
        x.index_copy_(0, where, part(x.index_select(0, where), of_them))
