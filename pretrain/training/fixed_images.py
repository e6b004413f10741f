"""Images that a run looks at again and again: read once, by all ranks, and their features by all ranks together.

Every rank reads its share at the start and runs it through the sharded encoder, in the same number of passes as all the
others, since each pass gathers parameters from all of them.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.encoders.preprocessing import Preprocessing
from pretrain.objectives.figures import class_tokens
from pretrain.run.across_ranks import gathered

IMAGES_A_PASS = 64  # images a pass
BetweenBatches = Callable[[Iterable[Tensor], int], Iterable[Tensor]]


class FixedImages:
    """``count`` images, each uint8 (height, width, 3) as ``read(i)`` has it, of which this rank holds its share as the
    network gets them."""

    def __init__(
        self, count: int, read: Callable[[int], np.ndarray], preprocessing: Preprocessing, rank: int, world_size: int
    ) -> None:
        self.count, self.preprocessing, self.share = count, preprocessing, -(-count // world_size)
        # The last images are read by several ranks where they don't divide: equal shares are equal numbers of passes.
        self.own = [min(i * world_size + rank, count - 1) for i in range(self.share)]
        plain = Preprocessing(
            preprocessing.image_size,
            preprocessing.resize_to,
            (0.0, 0.0, 0.0),
            (1.0, 1.0, 1.0),
            preprocessing.interpolation,
        )
        images = [plain(torch.from_numpy(np.array(read(i))).unsqueeze(0)) for i in self.own]
        self.images = (torch.cat(images) * 255).round().byte()  # (share, 3, S, S)

    def features(
        self, encoder: nn.Module, device: torch.device, between: BetweenBatches = lambda batches, _: batches
    ) -> Tensor:
        """Features ``(count, width)`` of all images, on every rank; ``between`` hands on the batches, told how many there
        are."""
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        parts = self.images.split(IMAGES_A_PASS)
        own = [
            class_tokens(encoder, (part.to(device).float() / 255 - mean) / std) for part in between(parts, len(parts))
        ]
        return self.of_all(torch.cat(own))

    def of_all(self, own: Tensor) -> Tensor:
        """Rows ``(share, …)`` of this rank's images → ``(count, …)`` of all images, on every rank."""
        return gathered(own).transpose(0, 1).flatten(0, 1)[: self.count]


def agreed(figures: dict[str, float], device: torch.device) -> dict[str, float]:
    """The first rank's figures, on every rank: processors round differently, and a run must not end on one of them
    alone."""
    first = gathered(torch.tensor(list(figures.values()), dtype=torch.float64, device=device))[0]
    return dict(zip(figures, first.tolist(), strict=True))
