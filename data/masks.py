"""Which patches of a crop, or cells of a slide's grid, the student doesn't see: BEiT's block masks, stratified over the
global batch as in DINOv2.

DINOv2 masks exactly half of the global crops of a batch and spreads their mask ratios evenly over (.1, .5). Both are
statements about the batch, so they are drawn for the global batch, and a rank takes its part.
"""

import math

import numpy as np

from data.keyed import rng


def ratios(crops: int, share: float, low: float, high: float, seed: int, step: int) -> np.ndarray:
    """The mask ratio of each global crop of batch ``step``: ``(crops,)``, 0 for the unmasked.

    Of ``crops``, ``int(crops * share)`` are masked; the i-th of them draws its ratio from the i-th of that many equal
    parts of (low, high); who is i-th is a permutation (DINOv2, ``collate_data_and_cast``).
    """
    draw = rng(seed, "mask ratios", step)
    masked = int(crops * share)
    edges = np.linspace(low, high, masked + 1)
    drawn = np.zeros(crops)
    drawn[:masked] = draw.uniform(edges[:-1], edges[1:])
    return draw.permutation(drawn)


def blocks(rows: int, columns: int, ratio: float, draw: np.random.Generator) -> np.ndarray:
    """A bool mask ``(rows, columns)`` with about ``ratio`` of the patches true, made of rectangles.

    BEiT's rule with DINOv2's numbers: a rectangle's area is uniform between 4 and what is still wanted (at most half
    the grid), its aspect ratio log-uniform in (.3, 1/.3); it is taken if it adds at least one new patch and not more
    than wanted. Ten tries for each, until the target is met or a rectangle finds no place: 5 to 12 % of the draws miss
    their target by one or more, as the reference's do.
    """
    mask = np.zeros((rows, columns), dtype=bool)
    wanted = int(rows * columns * ratio)
    while wanted > 0:
        largest = min(wanted, rows * columns // 2)
        for area, log_aspect, down, right in draw.random((10, 4)).tolist():
            area = 4 + (largest - 4) * area
            aspect = math.exp((2 * log_aspect - 1) * math.log(1 / 0.3))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < rows and 0 < w < columns):
                continue
            top, left = int(down * (rows - h + 1)), int(right * (columns - w + 1))
            patch = mask[top : top + h, left : left + w]
            new = h * w - int(patch.sum())
            if 0 < new <= wanted:
                patch[:] = True
                wanted -= new
                break
        else:
            break
    return mask


def exact_blocks(valid: np.ndarray, ratio: float, draw: np.random.Generator) -> np.ndarray:
    """A bool mask like ``valid`` (rows, columns): `blocks` on its true places, and then as many single places dropped or
    added at random as make it exactly ``round(ratio · n)`` of the n true ones."""
    rows, columns = valid.shape
    mask = blocks(rows, columns, ratio, draw) & valid
    more = round(ratio * int(valid.sum())) - int(mask.sum())
    places = np.flatnonzero(mask if more < 0 else valid & ~mask)
    mask.flat[draw.permutation(places)[: abs(more)]] = more > 0
    return mask
