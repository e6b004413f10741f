"""Predicts a tile's embedding from another tile's encoding, the displacement between them, and the slide's vector.

other tile ─┐
displacement┼─ sum of linear maps ─▶ residual layers ─▶ norm ─▶ embedding of the hidden tile
slide ──────┘
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.longnet import fill_as_released
from models.operations import Operations, linear_maps
from models.positions import check_sines, position_embedding


class PairPredictor(nn.Module):
    """``farthest``: cells, along either axis, that a tile may lie from the other. Raises ValueError when ``width`` isn't
    that of sines and cosines."""

    def __init__(
        self, *, tile_width: int, slide_width: int, output_width: int, width: int, depth: int, farthest: int
    ) -> None:
        super().__init__()
        check_sines(width)
        self.width, self.farthest = width, farthest
        self.of_tile = nn.Linear(tile_width, width)
        self.slide_norm = nn.LayerNorm(slide_width)  # a mean of many tiles is short
        self.of_slide = nn.Linear(slide_width, width)
        self.of_displacement = nn.Linear(width, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, output_width)

    def forward(self, tiles: Tensor, displacements: Tensor, slides: Tensor, slide_of: Tensor) -> Tensor:
        """(P, output_width) for the encodings ``tiles`` (P, tile_width) of the other tiles, ``displacements`` (P, 2) from
        them in cells, and the vectors ``slides`` (B, slide_width), of which each pair's is ``slide_of`` (P,)."""
        # Signs matter, and sines and cosines are of numbers from 0 on.
        places = position_embedding(displacements + self.farthest, self.width, 2 * self.farthest + 1).to(tiles.dtype)
        of_slides = self.of_slide(self.slide_norm(slides))
        x = self.of_tile(tiles) + self.of_displacement(places) + of_slides[slide_of]
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(F.gelu(x)))

    def operations(self, pairs: int, slides: int) -> Operations:
        """Of a pass over ``pairs`` of ``slides``."""
        found = linear_maps(pairs, self.of_tile, self.layers, self.head) + linear_maps(slides, self.of_slide)
        return found + linear_maps(pairs, self.of_displacement, of_data=True)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill a full-size CPU tensor with the initial value of parameter ``name``; KeyError when there is none."""
        if name not in self.state_dict():
            raise KeyError(name)
        fill_as_released(name, tensor, generator, 1.0)
