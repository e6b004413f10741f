"""Which patches of a crop, or cells of a slide's grid, the student doesn't see: BEiT's block masks, single patches, or
squares, stratified over the global batch as in DINOv2.

DINOv2 masks exactly half of the global crops of a batch and spreads their mask ratios evenly over (.1, .5). Both are
statements about the batch, so they are drawn for the global batch, and a rank takes its part.
"""

import math
from dataclasses import dataclass

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


def scattered(rows: int, columns: int, ratio: float, draw: np.random.Generator) -> np.ndarray:
    """A bool mask ``(rows, columns)`` with ``int(rows · columns · ratio)`` single patches true."""
    mask = np.zeros(rows * columns, dtype=bool)
    mask[draw.permutation(rows * columns)[: int(rows * columns * ratio)]] = True
    return mask.reshape(rows, columns)


def square_side(grid: int, area: float) -> int:
    """The side, in patches, of a square of the share ``area`` of a grid of ``grid`` × ``grid``; at least 1."""
    return max(1, round(grid * math.sqrt(area)))


def squares(grid: int, count: int, area: float, draw: np.random.Generator) -> np.ndarray:
    """A bool mask ``(grid, grid)`` with ``count`` squares true, each about ``area`` of it, overlapping as they fall
    (nanopath's target blocks)."""
    mask, side = np.zeros((grid, grid), dtype=bool), square_side(grid, area)
    for top, left in draw.integers(grid - side + 1, size=(count, 2)).tolist():
        mask[top : top + side, left : left + side] = True
    return mask


MASK_KINDS = ("blocks", "scattered", "squares")


@dataclass(frozen=True)
class Masking:
    """Masks on the global crops: the share of crops that are masked, their range of ratios, the patch grid's side, and
    what a mask is made of, of `MASK_KINDS`. Of ``squares`` there are so many, each ``square_area`` of the crop, and
    ratios aren't asked."""

    share: float
    low: float
    high: float
    grid: int
    kind: str = "blocks"
    squares: int = 4
    square_area: float = 0.1

    def ratios(self, crops: int, seed: int, step: int) -> np.ndarray:
        """`ratios` of a batch of so many global crops; 1 for those that are masked by squares."""
        low, high = (1.0, 1.0) if self.kind == "squares" else (self.low, self.high)
        return ratios(crops, self.share, low, high, seed, step)

    def mask(self, ratio: float, draw: np.random.Generator) -> np.ndarray:
        """That of a crop with a ``ratio`` of `ratios`, ``(grid, grid)`` bool: nothing where it is 0."""
        if not ratio:
            return np.zeros((self.grid, self.grid), dtype=bool)
        if self.kind == "squares":
            return squares(self.grid, self.squares, self.square_area, draw)
        return (scattered if self.kind == "scattered" else blocks)(self.grid, self.grid, ratio, draw)

    def expected(self, crops: int) -> int:
        """Masked patches of so many global crops, in the mean."""
        share = (self.low + self.high) / 2
        if self.kind == "squares":
            # A patch at i of an axis is covered by as many of its places as begin at i - side + 1 … i, inside the grid.
            side, at = square_side(self.grid, self.square_area), np.arange(self.grid)
            places = self.grid - side + 1
            covered = (np.minimum(at, places - 1) - np.maximum(at - side + 1, 0) + 1) / places
            share = float(np.mean(1 - (1 - np.outer(covered, covered)) ** self.squares))
        return round(int(crops * self.share) * self.grid**2 * share)


def exact_blocks(valid: np.ndarray, ratio: float, draw: np.random.Generator) -> np.ndarray:
    """A bool mask like ``valid`` (rows, columns): `blocks` on its true places, and then as many single places dropped or
    added at random as make it exactly ``round(ratio · n)`` of the n true ones."""
    rows, columns = valid.shape
    mask = blocks(rows, columns, ratio, draw) & valid
    more = round(ratio * int(valid.sum())) - int(mask.sum())
    places = np.flatnonzero(mask if more < 0 else valid & ~mask)
    mask.flat[draw.permutation(places)[: abs(more)]] = more > 0
    return mask
