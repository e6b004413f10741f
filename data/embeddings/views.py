"""What one training step sees of a slide: its tile grid cropped, flipped and shifted, and most of its tiles masked.

Everything happens on integers, cells of the grid, and ends in row-major order: positions stay exact, and a slide
encoder that segments its sequence always meets tiles in the order that it will meet at inference.
"""

import numpy as np

from data.slides.coordinates import row_major

FEWEST_VISIBLE = 4  # tiles in a sequence: with fewer there is nothing to mask from, nor to predict


def augment_sequence(
    rows: np.ndarray, cells: np.ndarray, random: np.random.Generator, crop: float, shift_grid: int, flip: float
) -> tuple[np.ndarray, np.ndarray]:
    """Augment a sequence on its integer grid: crop, flip, shift, and sort again → rows (n,) and cells (n, 2) in
    row-major order.

    crop: side of a window at a random place, as a share of the sequence's width and height (a window with fewer than
    `FEWEST_VISIBLE` tiles is not used: the sequence stays whole). flip: probability of a left-right flip. shift_grid:
    the sequence, moved as one piece, lands anywhere in a grid of this many cells a side (at its corner when it is
    larger).
    """
    low, extent = cells.min(axis=0), np.ptp(cells, axis=0) + 1
    window = np.ceil(crop * extent).astype(np.int64)
    corner = low + random.integers(0, extent - window + 1)
    inside = ((cells >= corner) & (cells < corner + window)).all(axis=1)
    if inside.sum() >= FEWEST_VISIBLE:
        rows, cells = rows[inside], cells[inside]
    low, extent = cells.min(axis=0), np.ptp(cells, axis=0) + 1
    cells = cells - low
    if random.random() < flip:
        cells[:, 0] = extent[0] - 1 - cells[:, 0]
    cells = cells + random.integers(0, np.maximum(shift_grid - extent, 0) + 1)
    order = row_major(cells[:, 0], cells[:, 1])
    return rows[order], cells[order]


def masked_count(n: int, ratio: float) -> int:
    """How many of n tiles are masked: ``round(ratio · n)``, leaving at least one masked and one visible."""
    return min(max(round(ratio * n), 1), n - 1)


def random_mask(n: int, ratio: float, random: np.random.Generator) -> np.ndarray:
    """(n,) bool with `masked_count` tiles masked, uniformly. A mask, not an order: visible tiles stay in row-major
    order."""
    mask = np.zeros(n, dtype=bool)
    mask[random.permutation(n)[: masked_count(n, ratio)]] = True
    return mask


def block_mask(cells: np.ndarray, ratio: float, side: int, random: np.random.Generator) -> np.ndarray:
    """(n,) bool with `masked_count` tiles masked in whole blocks of ``side`` × ``side`` cells, the last of them in
    part.

    The blocks form a grid at a random offset and are masked in random order; a masked tile then has no visible
    neighbour nearer than its block's edge, which takes interpolation away.
    """
    offset = random.integers(0, side, size=2)
    blocks = (cells - cells.min(axis=0) + offset) // side
    names, block = np.unique(blocks, axis=0, return_inverse=True)
    turn = random.permutation(len(names))[block.reshape(-1)]
    order = np.lexsort((random.random(len(cells)), turn))
    mask = np.zeros(len(cells), dtype=bool)
    mask[order[: masked_count(len(cells), ratio)]] = True
    return mask
