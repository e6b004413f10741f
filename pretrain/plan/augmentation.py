"""What the augmentation takes of a GPU's memory before a forward, beside the crops that it makes: a batch is augmented
on tensors without numbers, and its memory followed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.tiles.augment import augment_together, with_shifted_stains
from data.tiles.augment_parameters import draw_parameters
from pretrain.plan.ledger import Ledger
from pretrain.plan.torch_internals import FakeTensorMode, TorchDispatchMode, tree_leaves
from pretrain.settings.annotation import as_dictionary
from pretrain.training.tile_settings import ColourSettings, colour

FIRST, OTHERS, LOCAL = range(3)  # kinds of view, as colours are drawn for them


class _MemoryWatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Ledger()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.memory.see(tensor.untyped_storage(), "")
        return result


def augmentation_memory(data: Any, tiles: int, sides: list[tuple[int, int]]) -> int:
    """Bytes beside the crops of ``tiles`` tiles, at most at a time; ``data`` as in `TileData`, ``sides``: views a tile
    and their side, global ones first."""
    generator, colours = np.random.default_rng(0), colour(ColourSettings(**as_dictionary(data.colour)))
    crops: list[Tensor] = []
    with FakeTensorMode(allow_non_fake_inputs=True), _MemoryWatch() as watch:
        for number, (views, side) in enumerate(sides):
            kinds = [FIRST, *[OTHERS] * (views - 1)] if number == 0 else [LOCAL] * views
            rows = np.concatenate([draw_parameters(colours, np.array(kinds), generator) for _ in range(tiles)])
            images = with_shifted_stains(torch.empty(len(rows), 3, side, side, dtype=torch.uint8), rows)
            crops.append(augment_together(images, rows, torch.ones(3), torch.zeros(3)))
            del images
    (highest,) = watch.memory.highest()
    return sum(highest.values()) - sum(images.nbytes for images in crops)
