"""How images are prepared for a tile encoder."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """From a uint8 image to the encoder's input: scale the shorter side, cut the centre, normalise."""

    image_size: int  # pixels a side that the network gets
    resize_to: int  # pixels that the shorter side is scaled to before the central image_size are cut
    mean: tuple[float, ...]  # of the three channels, as is std
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → float32 (B, 3, image_size, image_size). Downscaling is antialiased, as PIL does it."""
        x = images.permute(0, 3, 1, 2).float() / 255
        height, width = x.shape[-2:]
        scale = self.resize_to / min(height, width)
        size = (round(height * scale), round(width * scale))
        if size != (height, width):
            x = F.interpolate(x, size, mode=self.interpolation, antialias=True, align_corners=False).clamp(0, 1)
        top, left = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
        x = x[..., top : top + self.image_size, left : left + self.image_size]
        # Filled in there: a copy would wait for the images before.
        mean, std = (
            torch.stack([torch.full((1, 1), value, device=x.device) for value in values])
            for values in (self.mean, self.std)
        )
        return (x - mean) / std

    def resizing(self) -> str:
        """What is done before normalising, in words."""
        cut = f", centre {self.image_size} px" if self.resize_to != self.image_size else ""
        return f"shorter side to {self.resize_to} px ({self.interpolation}, antialiased){cut}"

    def __str__(self) -> str:
        numbers = ["/".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std)]
        return f"{self.resizing()}, mean {numbers[0]}, std {numbers[1]}"
