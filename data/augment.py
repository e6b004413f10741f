"""Colour, blur and solarisation, batched on the device with parameters of each image's own.

The loader draws the parameters (`draw`, keyed by the tile's position in the run); the device applies them to a whole
batch of uint8 crops at once (`augment`). The order is DINOv2's: jitter (its four parts in an order of the image's own),
grey, blur, solarise, normalise; stains are shifted before them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Columns of a parameter row.
ORDER = slice(0, 4)  # the order of brightness, contrast, saturation and hue
FACTORS = slice(4, 8)  # their factors; hue in turns
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER, GREY, SIGMA, SOLARISE = 8, 9, 10, 11
"""Whether to jitter, whether to grey, the blur's sigma in pixels (0: none), whether to solarise."""
STAIN, STAINS, WIDTH = 12, slice(13, 16), 16
"""Whether to shift the stains, and by how much: haematoxylin, eosin, DAB."""

BLUR_TAPS = 9
NO_JITTER = 4  # place of the hue in an order that isn't followed
NO_WEIGHT = 1e-7  # of the middle tap's: less than float32 tells apart
CACHE = (
    1 << 19
)  # numbers a CPU works on at once: few enough for its cache, and enough that calls cost little beside them
PLANES = 8  # as large as a padded channel, for what lies between an image before and after
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision has it
DARKEST = 1e-6  # transmitted light below which nothing is told apart; its logarithm is the unit of stains
# Absorption of red, green and blue by haematoxylin, eosin and DAB (Ruifrok & Johnston 2001).
STAIN_COLOURS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


@dataclass(frozen=True)
class Colour:
    """Strengths and probabilities. Stains are shifted by up to ``stain_shift`` either way: see `shift_stains`. Blur and solarisation are given per kind of view: first global, other globals, local.

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


def draw(colour: Colour, kinds: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Parameter rows ``(views, WIDTH)`` float32 of a tile's views, whose ``kinds`` ``(views,)`` are 0 (first global), 1 (other
    globals) or 2 (local)."""
    u = generator.random((len(kinds), 17))
    rows = np.empty((len(kinds), WIDTH), dtype=np.float32)
    rows[:, ORDER] = u[:, :4].argsort(1)
    strengths = np.array((colour.brightness, colour.contrast, colour.saturation))
    low, high = np.maximum(0.0, 1 - strengths), 1 + strengths
    rows[:, 4:7] = low + u[:, 4:7] * (high - low)
    rows[:, 7] = colour.hue * (2 * u[:, 7] - 1)
    rows[:, JITTER] = u[:, 8] < colour.jitter_probability
    rows[:, GREY] = u[:, 9] < colour.grey_probability
    sigma = colour.blur_sigma[0] + u[:, 10] * (colour.blur_sigma[1] - colour.blur_sigma[0])
    rows[:, SIGMA] = np.where(u[:, 11] < np.take(colour.blur_probability, kinds), sigma, 0.0)
    rows[:, SOLARISE] = u[:, 12] < np.take(colour.solarise_probability, kinds)
    rows[:, STAIN] = u[:, 13] < colour.stain_probability
    rows[:, STAINS] = colour.stain_shift * (2 * u[:, 14:] - 1)
    return rows


def augment(images: Tensor, parameters: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 ``(N, 3, H, W)`` → float32 of the same shape, augmented and normalised by ``mean`` and ``std`` ``(3,)``.

    ``parameters`` ``(N, WIDTH)`` stays on the CPU, so that choosing images costs the device no synchronisation. Images whose
    hue has the same place in their order go together, on a CPU no more of them at once than suit its cache, and always in the
    same scratch memory: fresh pages cost a CPU more than the arithmetic on them. They go by their blur, so that what is blurred
    at once needs about as many taps.
    """
    device, rows = images.device, parameters.numpy()
    result = torch.empty(images.shape, dtype=torch.float32, device=device)
    size = max(1, CACHE // max(1, images[0].numel())) if device.type == "cpu" else len(images)
    weights = torch.from_numpy(_weights(rows)).to(device, non_blocking=True)
    hue_at = np.where(rows[:, JITTER] > 0, (rows[:, ORDER] == HUE).argmax(1), NO_JITTER)
    offset, scale = (mean / std).view(1, 3, 1, 1), (1 / std).view(1, 3, 1, 1)
    size = min(size, len(images))
    space, scratch = torch.empty((size, *images.shape[1:]), device=device), _scratch(images, size)
    for place in range(5):
        together = np.flatnonzero(hue_at == place)
        together = together[rows[together, SIGMA].argsort(kind="stable")]
        for numbers in (together[first : first + size] for first in range(0, len(together), size)):
            there, own = torch.from_numpy(numbers).to(device, non_blocking=True), rows[numbers]
            x = space[: len(numbers)].copy_(images.index_select(0, there)).mul_(1 / 255)
            _apply(x, own[:, STAIN] > 0, shift_stains, own[:, STAINS])
            if place != NO_JITTER:
                jitter(x, weights.index_select(0, there), place, scratch)
            _apply(x, own[:, GREY] > 0, lambda part, _: luma(part, scratch).expand_as(part), own[:, GREY])
            reach = _reach(float(own[:, SIGMA].max()))
            _apply(x, own[:, SIGMA] > 0, partial(blur, reach=reach, scratch=scratch), own[:, SIGMA])
            _apply(x, own[:, SOLARISE] > 0, solarise, own[:, SOLARISE])
            _put(result, numbers, x.mul_(scale).sub_(offset))
    return result


def _weights(rows: np.ndarray) -> np.ndarray:
    """What `jitter` needs for each place of each image's order: ``(N, 4, 3)``; see `blend`, and for the hue its turns."""
    order = rows[:, ORDER].astype(np.int64)
    factors = np.take_along_axis(rows[:, FACTORS], order, 1)
    rest = 1 - factors
    return np.stack([factors, rest * (order == SATURATION), rest * (order == CONTRAST)], 2)


def jitter(x: Tensor, weights: Tensor, hue_at: int, scratch: Tensor) -> None:
    """The four parts of jitter by ``weights`` ``(N, 4, 3)``, in place, for images that all turn their hue in place ``hue_at``."""
    for place, of_place in enumerate(weights.view(len(x), 4, 3, 1, 1, 1).unbind(1)):
        if place == hue_at:
            hue(x, of_place[:, 0], scratch)
        else:
            factor, grey, mean_grey = of_place.unbind(1)
            blend(x, factor, grey, mean_grey, scratch)


def luma(x: Tensor, scratch: Tensor) -> Tensor:
    """Grey ``(N, 1, H, W)``, in the scratch memory."""
    (plane,) = _planes(scratch, x, 1)
    return torch.mul(x[:, :1], LUMA[0], out=plane).add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def blend(x: Tensor, factor: Tensor, grey: Tensor, mean_grey: Tensor, scratch: Tensor) -> Tensor:
    """``factor · x + grey · luma(x) + mean_grey · mean(luma(x))``, clipped to (0, 1), in place; weights ``(N, 1, 1, 1)``.

    Brightness by f is (f, 0, 0), saturation (f, 1 − f, 0), contrast (f, 0, 1 − f): in one form, images that are at
    different parts of their orders go together.
    """
    plane = luma(x, scratch)
    level = plane.mean((2, 3), keepdim=True) * mean_grey
    return torch.addcmul(plane.mul_(grey).add_(level), x, factor, out=x).clamp_(0, 1)


def hue(x: Tensor, turns: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Rotate the hue of HSV by ``turns`` ``(N, 1, 1, 1)``, in place: exact, and without a choice for each pixel.

    With green and blue sorted, then red and the larger of them, the hue in sixths of a turn is ``|k + (other − smaller) / chroma|``,
    where k is 0, −6, −2 or 4 as they lay. A channel is then ``value − chroma · f``: f = 1 within a sixth of a turn of the channel's
    opposite hue, falling to 0 at a third; the distance of two angles a, b on the circle is ``3 − ||a − b| − 3|``.
    """
    red, green, blue = x.split(1, 1)
    larger, smaller, value, other, swapped, chroma = _planes(_scratch(x) if scratch is None else scratch, x, 6)
    torch.maximum(green, blue, out=larger)
    torch.minimum(green, blue, out=smaller)
    torch.maximum(red, larger, out=value)
    torch.minimum(red, larger, out=other)
    torch.gt(blue, green, out=swapped)
    not_red = torch.gt(larger, red, out=larger)
    torch.sub(value, torch.minimum(other, smaller, out=chroma), out=chroma)
    sixths = other.sub_(smaller).div_(torch.clamp(chroma, min=1e-12, out=smaller))
    sixths.add_(not_red, alpha=-2).add_(not_red.mul_(12).sub_(6).mul_(swapped)).abs_()
    opposite = (torch.tensor([-3.0, -1.0, 1.0], device=x.device).view(1, 3, 1, 1) - 6 * turns).remainder(6)
    share = torch.sub(sixths, opposite, out=x).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(value, share, chroma, value=-1, out=x)


def solarise(x: Tensor, _: Tensor) -> Tensor:
    """Invert what is 128 or brighter, of 255."""
    bright = torch.ge(x, 128 / 255, out=torch.empty_like(x))
    return x.addcmul_(bright, 1 - 2 * x)


def shift_stains(x: Tensor, shift: Tensor) -> Tensor:
    """Add ``shift`` ``(N, 3)`` to the amounts of haematoxylin, eosin and DAB: the HED perturbation of Midnight and OpenMidnight.

    Beer-Lambert: ``log x / log 1e-6 = stains · colours``, per pixel; stains are clipped to (0, 1) after the shift, as
    OpenMidnight does (scikit-image's ``rgb2hed`` and ``hed2rgb``, Ruifrok & Johnston 2001).
    """
    unit, pixels = math.log(DARKEST), x.clamp(min=DARKEST).log_().flatten(2)
    colours = torch.tensor(STAIN_COLOURS)
    to_stains, to_light = (torch.linalg.inv(colours).T / unit).to(x.device), (colours.T * unit).to(x.device)
    stains = (to_stains @ pixels).clamp_(min=0).add_(shift.view(-1, 3, 1)).clamp_(0, 1)
    return (to_light @ stains).exp_().clamp_(0, 1).view(x.shape)


def blur(x: Tensor, sigma: Tensor, reach: int = BLUR_TAPS // 2, scratch: Tensor | None = None) -> Tensor:
    """Gaussian of nine taps with a sigma (pixels) ``(N, 1, 1, 1)`` per image, reflected at the border; only those taps up to
    ``reach`` from the middle are added up (`_reach`).

    Rows, then columns, as sums of shifted images, two taps of one weight at a time. Rows keep their padding, so that a shift
    to the side is one of the flat image: long loops over whole images, which is faster than a convolution with a kernel for each.
    """
    taps = torch.exp(-0.5 * (torch.arange(BLUR_TAPS // 2 + 1, device=x.device) / sigma.view(-1, 1)) ** 2)
    taps = taps / (2 * taps.sum(1, keepdim=True) - 1)  # (N, taps), from the middle outwards
    padded = F.pad(x, (reach, reach, reach, reach), mode="reflect").contiguous()
    taps, height, width = taps[:, : reach + 1].repeat_interleave(3, 0), x.shape[2], padded.shape[3]
    first, other = (_scratch(x) if scratch is None else scratch).chunk(2)
    # What lies behind the rows' end is added to nothing that is kept.
    down = first[: len(taps) * (height * width + 2 * reach)].view(len(taps), -1)
    _taps(padded.view(len(taps), -1), taps, width, down[:, : height * width], other)
    across = _taps(down, taps, 1, padded.view(len(taps), -1)[:, : height * width], other)
    return across.view(len(x), 3, height, width)[..., : x.shape[3]]


def _taps(rows: Tensor, taps: Tensor, stride: int, found: Tensor, scratch: Tensor) -> Tensor:
    """``Σ taps[:, |k|] · rows[:, i + k · stride]`` for every i where all of them lie inside, in ``found``."""
    reach, length = taps.shape[1] - 1, found.shape[1]
    middle, *others = taps.split(1, 1)
    both = scratch[: found.numel()].view(found.shape)
    torch.mul(rows.narrow(1, reach * stride, length), middle, out=found)
    for step, weight in enumerate(others, start=1):
        before, after = (rows.narrow(1, (reach + k) * stride, length) for k in (-step, step))
        found.addcmul_(torch.add(before, after, out=both), weight)
    return found


def _reach(sigma: float) -> int:
    """How far from the middle a tap of a blur with ``sigma`` (pixels) weighs anything."""
    return max(1, min(BLUR_TAPS // 2, int(sigma * math.sqrt(-2 * math.log(NO_WEIGHT)))))


def _scratch(images: Tensor, count: int | None = None) -> Tensor:
    """Memory for what lies between an image before and after, for ``count`` of the images at once: flat float32."""
    n, _, height, width = images.shape
    return torch.empty(PLANES * (count or n) * (height + BLUR_TAPS) * (width + BLUR_TAPS), device=images.device)


def _planes(scratch: Tensor, x: Tensor, count: int) -> tuple[Tensor, ...]:
    """``count`` single-channel images ``(N, 1, H, W)`` in the scratch memory."""
    n, _, height, width = x.shape
    return scratch[: count * n * height * width].view(count, n, 1, height, width).unbind(0)


def _apply(x: Tensor, chosen: np.ndarray, part: Callable[[Tensor, Tensor], Tensor], values: np.ndarray) -> None:
    """``x[chosen] ← part(x[chosen], values[chosen])`` in place; ``values`` arrive as ``(n, 1, 1, 1)``, stains as ``(n, 3, 1, 1)``."""
    numbers = np.flatnonzero(chosen)
    if len(numbers) == 0:
        return
    factors = torch.from_numpy(values[numbers].reshape(len(numbers), -1, 1, 1)).to(x.device, non_blocking=True)
    first, last = int(numbers[0]), int(numbers[-1]) + 1
    if last - first == len(numbers):  # neighbours, as what is blurred always is: no copy of them
        x[first:last].copy_(part(x[first:last], factors))
        return
    rows = torch.from_numpy(numbers).to(x.device, non_blocking=True)
    _put(x, numbers, part(x.index_select(0, rows), factors))


def _put(images: Tensor, numbers: np.ndarray, values: Tensor) -> None:
    """``images[numbers] ← values``; on a CPU one by one, at half the cost of all at once."""
    if images.device.type == "cpu":
        for number, value in zip(numbers.tolist(), values, strict=True):
            images[number].copy_(value)
    else:
        images.index_copy_(0, torch.from_numpy(numbers).to(images.device, non_blocking=True), values)
