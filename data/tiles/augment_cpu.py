"""`data.tiles.augment`'s arithmetic for a CPU: an image at a time, each operation over as many pixels as the nearest
cache holds.

On a GPU many images share a kernel; on a CPU what costs is going through memory and calling, and here an image is read
and written three times (its contrast needs a mean of all of it) and only what its own parameters ask for is computed.
numba compiles it at the first use, some seconds, and keeps the result beside this file.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from data.fault import Fault
from data.tiles.augment_parameters import (
    BLUR_TAPS,
    BRIGHTNESS,
    CONTRAST,
    FACTORS,
    GREY,
    HUE,
    JITTER,
    LUMA,
    SATURATION,
    SIGMA,
    SOLARISE,
    SOLARISE_FROM,
)

PIXELS_A_BLOCK = 2048  # pixels whose three channels stay in the nearest cache
REACH = BLUR_TAPS // 2
FIRST_FACTOR = FACTORS.start
# Numbers of Python's would make numba compute in double precision.
ZERO, ONE, TWO, THREE, SIX = (np.float32(number) for number in (0, 1, 2, 3, 6))
RED, GREEN, BLUE = (np.float32(weight) for weight in LUMA)
BYTE, BRIGHT, NO_CHROMA = np.float32(1 / 255), np.float32(SOLARISE_FROM), np.float32(1e-12)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba's loops of a function, kept on disk. Raises Fault where they can't be."""
    # Nothing that lets a sum or a product be rounded otherwise: numba links what it has just compiled differently from
    # what it finds on disk, and a run that resumes would differ from itself in the last bit.
    fast = {"nnan", "ninf", "nsz"}
    try:
        return njit(fastmath=fast, nogil=True, cache=True, error_model="numpy")(function)  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise Fault(
            f"numba finds no folder to keep what it compiles for colour on a CPU ({error}): "
            "set NUMBA_CACHE_DIR to one that can be written"
        ) from error


@compiled
def _luma(red, green, blue):  # type: ignore[no-untyped-def]
    return RED * red + GREEN * green + BLUE * blue


@compiled
def _clip(value):  # type: ignore[no-untyped-def]
    return min(max(value, ZERO), ONE)


@compiled
def augment_each(images, rows, scale, offset, result):  # type: ignore[no-untyped-def]
    """Images ``(N, 3, H, W)`` in 0..255 by parameters ``(N, WIDTH)`` without the stains, times ``scale`` ``(3,)`` plus
    ``offset``, into ``result``."""
    height, width = images.shape[2:]
    plane, line = np.empty((height, width), np.float32), np.empty(width + 2 * REACH, np.float32)
    for n in range(len(images)):
        x, row = result[n].reshape(3, height * width), rows[n]
        _jitter(images[n].reshape(3, height * width), row, x)
        if row[SIGMA] > 0:
            _blur(result[n], row[SIGMA], plane, line)
        for channel in range(3):
            values, times, plus = x[channel], scale[channel], offset[channel]
            if row[SOLARISE] > 0:
                for i in range(len(values)):
                    values[i] = (ONE - values[i] if values[i] >= BRIGHT else values[i]) * times + plus
            else:
                for i in range(len(values)):
                    values[i] = values[i] * times + plus


@compiled
def _jitter(image, row, x):  # type: ignore[no-untyped-def]
    """``image`` ``(3, pixels)`` in 0..255 → ``x`` in (0, 1), jittered in the order of ``row``, and grey if it says
    so."""
    pixels = image.shape[1]
    contrast_at = 0
    while row[contrast_at] != CONTRAST:
        contrast_at += 1
    total = 0.0
    for start in range(0, pixels, PIXELS_A_BLOCK):
        stop = min(start + PIXELS_A_BLOCK, pixels)
        red, green, blue = x[0, start:stop], x[1, start:stop], x[2, start:stop]
        for i in range(stop - start):
            red[i] = image[0, start + i] * BYTE
            green[i] = image[1, start + i] * BYTE
            blue[i] = image[2, start + i] * BYTE
        if row[JITTER] > 0:
            for place in range(contrast_at):
                _part(red, green, blue, row, place)
            level = ZERO
            for i in range(stop - start):
                level += _luma(red[i], green[i], blue[i])
            total += level
    if row[JITTER] == 0 and row[GREY] == 0:
        return
    factor = row[FIRST_FACTOR + CONTRAST]
    rest = (ONE - factor) * np.float32(total / pixels)
    for start in range(0, pixels, PIXELS_A_BLOCK):
        stop = min(start + PIXELS_A_BLOCK, pixels)
        red, green, blue = x[0, start:stop], x[1, start:stop], x[2, start:stop]
        if row[JITTER] > 0:
            _blend(red, green, blue, factor, ZERO, rest)
            for place in range(contrast_at + 1, 4):
                _part(red, green, blue, row, place)
        if row[GREY] > 0:
            for i in range(stop - start):
                red[i] = green[i] = blue[i] = _luma(red[i], green[i], blue[i])


@compiled
def _part(red, green, blue, row, place):  # type: ignore[no-untyped-def]
    """Brightness, saturation or hue, whichever ``row`` has in this place of its order."""
    which = int(row[place])
    factor = row[FIRST_FACTOR + which]
    if which == BRIGHTNESS:
        _blend(red, green, blue, factor, ZERO, ZERO)
    elif which == SATURATION:
        _blend(red, green, blue, factor, ONE - factor, ZERO)
    elif which == HUE and factor != 0:
        _hue(red, green, blue, factor)


@compiled
def _blend(red, green, blue, factor, grey, rest):  # type: ignore[no-untyped-def]
    """``factor · x + grey · luma(x) + rest``, clipped to (0, 1)."""
    for i in range(len(red)):
        plus = grey * _luma(red[i], green[i], blue[i]) + rest
        red[i] = _clip(factor * red[i] + plus)
        green[i] = _clip(factor * green[i] + plus)
        blue[i] = _clip(factor * blue[i] + plus)


@compiled
def _hue(red, green, blue, turns):  # type: ignore[no-untyped-def]
    """As `data.tiles.augment.hue`, which says why."""
    opposite_red = (-THREE - SIX * turns) % SIX
    opposite_green = (-ONE - SIX * turns) % SIX
    opposite_blue = (ONE - SIX * turns) % SIX
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        larger, smaller = max(g, b), min(g, b)
        value, other = max(r, larger), min(r, larger)
        chroma = value - min(other, smaller)
        not_red, swapped = (ONE if larger > r else ZERO), (ONE if b > g else ZERO)
        k = -TWO * not_red + SIX * swapped * (TWO * not_red - ONE)
        sixths = abs(k + (other - smaller) / max(chroma, NO_CHROMA))
        red[i] = value - chroma * _clip(abs(abs(sixths - opposite_red) - THREE) - ONE)
        green[i] = value - chroma * _clip(abs(abs(sixths - opposite_green) - THREE) - ONE)
        blue[i] = value - chroma * _clip(abs(abs(sixths - opposite_blue) - THREE) - ONE)


@compiled
def _blur(image, sigma, plane, line):  # type: ignore[no-untyped-def]
    """As `data.tiles.augment.blur`, one image ``(3, H, W)`` in place: columns into ``plane``, then rows of it through a
    reflected ``line``."""
    _, height, width = image.shape
    taps = np.exp(np.float32(-0.5) * (np.arange(REACH + 1).astype(np.float32) / sigma) ** 2)
    taps /= TWO * taps.sum() - ONE
    for channel in range(3):
        x = image[channel]
        for row in range(height):
            into = plane[row]
            for i in range(width):
                into[i] = taps[0] * x[row, i]
            for step in range(1, REACH + 1):
                before = x[abs(row - step)]
                after = x[height - 1 - abs(height - 1 - row - step)]
                weight = taps[step]
                for i in range(width):
                    into[i] += weight * (before[i] + after[i])
        for row in range(height):
            line[REACH : REACH + width] = plane[row]
            for step in range(1, REACH + 1):
                line[REACH - step] = plane[row, step]
                line[REACH + width - 1 + step] = plane[row, width - 1 - step]
            into = x[row]
            for i in range(width):
                into[i] = taps[0] * line[REACH + i]
            for step in range(1, REACH + 1):
                weight = taps[step]
                for i in range(width):
                    into[i] += weight * (line[REACH + i - step] + line[REACH + i + step])
