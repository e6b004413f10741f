"""What the network sees: the views of a few tiles as a recipe cuts, colours, masks and normalises them, as one
picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.keyed import rng
from data.tiles.augment import augment
from data.tiles.augment_parameters import draw_parameters
from data.tiles.crops import cut
from pretrain.objectives.tile_batch import TileBatch
from pretrain.settings.composition import load
from pretrain.training.tile_settings import checked_views, colour, crop_sizes, masking
from pretrain.training.view_sheet import view_sheet


def recipe_settings(recipe: str, overrides: Sequence[str] = ()) -> Any:
    """The settings of 'pretrain tile' under a recipe, wherever its own tiles come from. Raises Fault for a recipe that
    there isn't."""
    return load("tile", ["run=none", "data=tiles", "data.shards=none", f"recipe={recipe}", *overrides]).object()


def seen(tiles: Sequence[np.ndarray], config: Any, seed: int) -> Image.Image:
    """A row for each of ``tiles``, uint8 (H, W, 3): its global views, masked patches greyed, then its local ones.

    ``config`` are the settings of 'pretrain tile'. The views are made by the functions that make them in training; the
    colours are those after augmentation, before they are normalised.
    """
    patch = config.model["patch_size"]
    sizes = crop_sizes(config.data.crops, checked_views(config.objective, patch, config.data.crops))
    colours, side = colour(config.data.colour), sizes.global_size // patch
    masks = masking(config.objective, config.data.masks, side)
    ratios = masks.ratios(len(tiles) * sizes.global_count, seed, 0).reshape(sizes.global_count, len(tiles))
    views = [cut(tile, sizes, seed, number) for number, tile in enumerate(tiles)]
    rows = [draw_parameters(colours, sizes.kinds(), rng(seed, "colour", number)) for number in range(len(tiles))]
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    crops = []
    first = 0
    for count, _ in sizes.sides():
        last = first + count
        images = torch.stack([of_tile[view] for view in range(first, last) for of_tile in views])
        parameters = torch.from_numpy(np.stack([of_tile[view] for view in range(first, last) for of_tile in rows]))
        crops.append((augment(images, parameters, mean, std), count))
        first = last
    masked = [
        masks.mask(ratios[view, number], rng(seed, "mask", number, view))
        for view in range(sizes.global_count)
        for number in range(len(tiles))
    ]
    batch = TileBatch(crops, torch.from_numpy(np.stack(masked)))
    return view_sheet(batch, config.data.mean, config.data.std)
