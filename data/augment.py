"""Colour, blur and solarisation, batched on the device with parameters of each image's own.

The loader draws the parameters (`draw`, keyed by the tile's position in the run); the device applies them to a whole
batch of uint8 crops at once (`augment`). The order is DINOv2's: jitter (its four parts in an order of the image's own),
grey, blur, solarise, normalise; stains are shifted before them.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Columns of a parameter row.
ORDER = slice(0, 4)  # the order of brightness (0), contrast (1), saturation (2) and hue (3)
FACTORS = slice(4, 8)  # their factors; hue in turns
JITTER, GREY, SIGMA, SOLARISE = 8, 9, 10, 11
"""Whether to jitter, whether to grey, the blur's sigma in pixels (0: none), whether to solarise."""
STAIN, STAINS, WIDTH = 12, slice(13, 16), 16
"""Whether to shift the stains, and by how much: haematoxylin, eosin, DAB."""

BLUR_TAPS = 9
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


def draw(colour: Colour, kind: int, generator: np.random.Generator) -> np.ndarray:
    """One parameter row ``(WIDTH,)`` float32 for a view of ``kind`` 0 (first global), 1 (other globals) or 2 (local)."""
    u = generator.random(9)
    row = np.zeros(WIDTH, dtype=np.float32)
    row[ORDER] = generator.permutation(4)
    strengths = (colour.brightness, colour.contrast, colour.saturation)
    row[4:7] = [max(0.0, 1 - s) + u_ * (1 + s - max(0.0, 1 - s)) for s, u_ in zip(strengths, u, strict=False)]
    row[7] = colour.hue * (2 * u[3] - 1)
    row[JITTER] = u[4] < colour.jitter_probability
    row[GREY] = u[5] < colour.grey_probability
    low, high = colour.blur_sigma
    row[SIGMA] = (low + u[6] * (high - low)) if u[7] < colour.blur_probability[kind] else 0.0
    row[SOLARISE] = u[8] < colour.solarise_probability[kind]
    row[STAIN] = generator.random() < colour.stain_probability
    row[STAINS] = colour.stain_shift * (2 * generator.random(3) - 1)
    return row


def augment(images: Tensor, parameters: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 ``(N, 3, H, W)`` → float32 of the same shape, augmented and normalised by ``mean`` and ``std`` ``(3,)``.

    ``parameters`` ``(N, WIDTH)`` stays on the CPU, so that choosing images costs the device no synchronisation.
    """
    x = images.float().div_(255)
    _apply(x, parameters[:, STAIN] > 0, shift_stains, parameters[:, STAINS])
    for slot in range(4):
        for which, part in enumerate((brightness, contrast, saturation, hue)):
            chosen = (parameters[:, JITTER] > 0) & (parameters[:, ORDER][:, slot] == which)
            _apply(x, chosen, part, parameters[:, FACTORS][:, which])
    _apply(x, parameters[:, GREY] > 0, lambda part, _: luma(part).expand_as(part), parameters[:, GREY])
    _apply(x, parameters[:, SIGMA] > 0, blur, parameters[:, SIGMA])
    _apply(
        x,
        parameters[:, SOLARISE] > 0,
        lambda part, _: torch.where(part >= 128 / 255, 1 - part, part),
        parameters[:, SOLARISE],
    )
    return x.sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))


def luma(x: Tensor) -> Tensor:
    """Grey ``(N, 1, H, W)``."""
    return LUMA[0] * x[:, :1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """``f · x``, clipped to (0, 1)."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """``f · x + (1 − f) · mean grey``, clipped."""
    return (x * factor + (1 - factor) * luma(x).mean((2, 3), keepdim=True)).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """``f · x + (1 − f) · grey``, clipped."""
    return (x * factor + (1 - factor) * luma(x)).clamp_(0, 1)


def hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of HSV by ``turns``: exact, through ``f(n) = v − v·s·max(0, min(k, 4 − k, 1))``, ``k = (n + 6h) mod 6``."""
    value, top = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, 1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    h = torch.where(top == 0, (g - b) / safe, torch.where(top == 1, 2 + (b - r) / safe, 4 + (r - g) / safe))
    k = torch.remainder(torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1) + h + 6 * turns, 6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def shift_stains(x: Tensor, shift: Tensor) -> Tensor:
    """Add ``shift`` ``(N, 3)`` to the amounts of haematoxylin, eosin and DAB: the HED perturbation of Midnight and OpenMidnight.

    Beer-Lambert: ``log x / log 1e-6 = stains · colours``, per pixel; stains are clipped to (0, 1) after the shift, as
    OpenMidnight does (scikit-image's ``rgb2hed`` and ``hed2rgb``, Ruifrok & Johnston 2001).
    """
    colours = torch.tensor(STAIN_COLOURS)
    to_stains, colours, unit = torch.linalg.inv(colours).to(x.device), colours.to(x.device), math.log(DARKEST)
    stains = torch.einsum("nchw,cs->nshw", x.clamp(min=DARKEST).log() / unit, to_stains).clamp(min=0)
    stains = (stains + shift.view(-1, 3, 1, 1)).clamp_(0, 1)
    return torch.einsum("nshw,sc->nchw", stains * unit, colours).exp().clamp_(0, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of nine taps with a sigma (pixels) per image, reflected at the border: ``K_rows · x · K_columnsᵀ``.

    As two matrix products with banded ``(side, side)`` matrices, which both CPUs and GPUs do far faster than a grouped
    convolution with a kernel per image.
    """
    rows = _blur_matrix(sigma.flatten(), x.shape[2])
    columns = rows if x.shape[2] == x.shape[3] else _blur_matrix(sigma.flatten(), x.shape[3])
    return rows.unsqueeze(1) @ x @ columns.mT.unsqueeze(1)


def _blur_matrix(sigma: Tensor, side: int) -> Tensor:
    """``(N, side, side)``: row i holds the taps around pixel i, those beyond the border folded back."""
    offsets = torch.arange(-(BLUR_TAPS // 2), BLUR_TAPS // 2 + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.unsqueeze(1)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # (N, taps)
    at = (torch.arange(side, device=sigma.device).unsqueeze(1) + offsets).abs()
    at = torch.where(at >= side, 2 * (side - 1) - at, at)  # (side, taps)
    matrix = sigma.new_zeros(len(sigma), side, side)
    return matrix.scatter_add_(2, at.expand(len(sigma), -1, -1), kernel.unsqueeze(1).expand(-1, side, -1))


def _apply(x: Tensor, chosen: Tensor, part, values: Tensor) -> None:  # type: ignore[no-untyped-def]
    """``x[chosen] ← part(x[chosen], values[chosen])`` in place; ``values`` arrive as ``(n, 1, 1, 1)``, stains as ``(n, 3, 1, 1)``."""
    rows = torch.nonzero(chosen).flatten()
    if len(rows) == 0:
        return
    factors = values[rows].view(len(rows), -1, 1, 1).to(x.device, non_blocking=True)
    rows = rows.to(x.device, non_blocking=True)
    x[rows] = part(x[rows], factors)
