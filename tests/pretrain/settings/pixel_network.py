"""A tissue rule of one's own, as a user writes it: a trained network that judges every pixel of a thumbnail.

pretrain shard slides=/slides out=shards --config-dir my_rules 'tissue={_target_: pixel_network.PixelNetwork, weights: tissue.pt}'
"""

import numpy as np
import torch

from data.slides.tissue import TissueRule


class PixelNetwork(TissueRule):
    """Tissue is where a network's logit of three channels is above ``threshold``."""

    mpp = 4.0  # µm a pixel of the thumbnails that it was trained on
    min_tissue = 0.3

    def __init__(self, *, weights: str, threshold: float = 0.0) -> None:
        self.network = torch.nn.Conv2d(3, 1, kernel_size=1)
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        self.threshold = threshold

    @torch.no_grad()
    def mask(self, rgb: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(rgb / np.float32(255)).permute(2, 0, 1)
        return (self.network(pixels)[0] > self.threshold).numpy()
