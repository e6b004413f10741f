"""The masked autoencoder of images (He et al. 2022): random masking, the decoder, and the pixels it predicts."""

import torch
from torch import Tensor, nn

from models.attention import check_heads
from models.operations import Operations, linear_maps, total_operations
from models.positions import check_sines, grid_embedding
from models.vit import MLP, Block


def kept_patches(patches: int, ratio: float) -> int:
    """How many of an image's ``patches`` are kept where the share ``ratio`` is masked."""
    return int(patches * (1 - ratio))


def random_masking(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches are kept: those with the least ``noise`` ``(B, L)``, `kept_patches` of them.

    Returns the kept ones ``(B, n)`` int64 in ascending order of noise, every patch's rank in that order ``(B, L)``
    int64, and the mask ``(B, L)`` bool, true where a patch is removed.
    """
    order = noise.argsort(dim=1)
    rank = order.argsort(dim=1)
    keep = kept_patches(noise.shape[1], ratio)
    return order[:, :keep], rank, rank >= keep


def pixels(images: Tensor, patch_size: int) -> Tensor:
    """``(B, 3, H, W)`` → each patch's pixels, row by row, channels last: ``(B, H/p * W/p, p * p * 3)``."""
    p = patch_size
    b, c, h, w = images.shape
    return images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def normalised(patches: Tensor) -> Tensor:
    """Each patch minus its mean over its standard deviation, ``√(var + 1e-6)`` with the unbiased variance (§4,
    "norm_pix")."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


class PixelDecoder(nn.Module):
    """From the visible patches to the pixels of all: thrown away after pretraining.

    Raises ValueError for a width that the heads or four sines and cosines don't divide.
    """

    def __init__(self, *, encoder_width: int, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        check_sines(width)
        self.width = width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.layers = nn.ModuleList(
            Block(width, heads, 4 * width, MLP, scaled=False, attention="sdpa") for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 3 * patch_size**2)

    def units(self) -> list[nn.Module]:
        """What is gathered, recomputed and compiled by itself, in the order in which it runs: see
        `pretrain.training.sharding`."""
        return list(self.layers)

    def forward(self, cls: Tensor, visible: Tensor, rank: Tensor, rows: int) -> Tensor:
        """Predicted pixels ``(B, L, p * p * 3)`` of all patches.

        ``cls`` ``(B, encoder_width)`` and ``visible`` ``(B, n, encoder_width)`` are the encoder's tokens, ``rank``
        ``(B, L)`` says which of visible and then masked patches lies at each place of the grid of ``rows`` rows.
        """
        b, length = rank.shape
        x = self.embed(visible)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(b, length - x.shape[1], -1)], dim=1)
        x = x.gather(1, rank.unsqueeze(-1).expand(-1, -1, self.width))
        x = x + grid_embedding(rows, length // rows, self.width, x.device).to(x.dtype)
        x = torch.cat([self.embed(cls).unsqueeze(1), x], dim=1).flatten(0, 1)  # the class token has no place
        for layer in self.layers:
            x = layer(x, [(b, length + 1)])
        return self.head(self.norm(x)).view(b, length + 1, -1)[:, 1:]

    def operations(self, images: int, visible: int, patches: int) -> Operations:
        """Of so many ``images``, each of ``patches`` patches, ``visible`` of them seen by the encoder."""
        blocks = (layer.operations([(images, patches + 1)]) for layer in self.layers if isinstance(layer, Block))
        around = linear_maps(images * (visible + 1), self.embed) + linear_maps(images * (patches + 1), self.head)
        return around + total_operations(blocks)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """MAE's initial values: see `models.initialise`."""
        if name not in self.state_dict():
            raise KeyError(name)
        if name == "mask_token":
            tensor.normal_(std=0.02, generator=generator)
        elif tensor.ndim == 2:
            nn.init.xavier_uniform_(tensor, generator=generator)
        else:
            tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
