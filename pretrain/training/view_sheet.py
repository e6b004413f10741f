"""A picture of a batch as the network sees it: the views of its first tiles."""

import torch
from PIL import Image
from torch import Tensor

from pretrain.objectives.tile_batch import TileBatch

SAMPLE_TILES = 8


def view_sheet(batch: TileBatch, mean: list[float], std: list[float]) -> Image.Image:
    """Rows of tiles, columns of views: global crops with their masked patches greyed, then local crops."""
    strips = []
    for which, (images, views) in enumerate(batch.crops):
        tiles = len(images) // views
        shown = images.detach().float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        if which == 0:
            side = shown.shape[-1] // batch.masks.shape[-1]
            covered = batch.masks.cpu().repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(1)
            shown = torch.where(covered, 0.6 * torch.ones(()) + 0.1 * shown, shown)
        strips.append(_rows(shown.unflatten(0, (views, tiles)).transpose(0, 1)[:SAMPLE_TILES]))
    height = max(strip.shape[1] for strip in strips)
    sheet = torch.ones(3, height, sum(strip.shape[2] for strip in strips) + 12 * (len(strips) - 1))
    left = 0
    for strip in strips:
        # Local crops are enlarged to the global crops' height, so that a tile stays on one row.
        width = round(strip.shape[2] * height / strip.shape[1])
        resized = torch.nn.functional.interpolate(strip.unsqueeze(0), (height, width), mode="nearest")[0]
        if left + resized.shape[2] > sheet.shape[2]:
            sheet = torch.cat([sheet, torch.ones(3, height, left + resized.shape[2] - sheet.shape[2])], dim=2)
        sheet[:, :, left : left + width] = resized
        left += resized.shape[2] + 12
    return Image.fromarray((sheet.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def _rows(images: Tensor) -> Tensor:
    """``(tiles, views, 3, s, s)`` → ``(3, tiles * (s + 4), views * (s + 4))``, white between them."""
    padded = torch.nn.functional.pad(images, (0, 4, 0, 4), value=1.0)
    return padded.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
