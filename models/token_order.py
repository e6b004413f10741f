"""The order in which a slide encoder that segments its sequence meets a slide's tiles.

Row by row, the tile above is as far along the sequence as the slide is wide. Along Hilbert's curve tiles that are near
on the slide are near in the sequence, so a segment is a compact piece of tissue.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ORDERS = ("rows", "hilbert")
LEVELS = 20  # halvings of the square that the curve fills: a million cells a side


def hilbert_index(cells: Tensor) -> Tensor:
    """Where cells ``(…, 2)``, integers from 0 to 2²⁰ − 1, lie along Hilbert's curve → ``(…,)`` int64. The curve is of
    one size for all slides, since another number of halvings would turn it."""
    x, y = cells.long().unbind(-1)
    index = torch.zeros_like(x)
    for level in reversed(range(LEVELS)):
        right, below = x >> level & 1, y >> level & 1
        index = index * 4 + (3 * right ^ below)
        # Each quarter holds a smaller curve: the two upper ones are mirrored at a diagonal.
        last = (1 << level) - 1
        x, y = x & last, y & last
        flipped = (below == 0) & (right == 1)
        x, y = torch.where(flipped, last - x, x), torch.where(flipped, last - y, y)
        x, y = torch.where(below == 0, y, x), torch.where(below == 0, x, y)
    return index


def along_hilbert(cells: Tensor, lengths: Sequence[int]) -> Tensor:
    """Indices ``(tokens,)`` that put packed slides of ``lengths`` tokens, each a class token and then its tiles at
    ``cells`` (tiles, 2), along the curve: slides and class tokens stay where they are."""
    tiles = hilbert_index(cells).split([n - 1 for n in lengths])
    # A slide's number stands above the curve's 40 bits; its class token comes before its first tile.
    slides = ((number << 2 * LEVELS + 1, places) for number, places in enumerate(tiles))
    keys = torch.cat([part for n, places in slides for part in (places.new_full((1,), n), places + (n + 1))])
    return keys.argsort(stable=True)
