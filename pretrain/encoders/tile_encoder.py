"""A frozen tile encoder: images in, features out.

It carries the preprocessing it was trained with, and a hash of both, so that two embeddings made with the same hash
were made the same way. Random weights are a separate, explicit question (`TileEncoder.random_twin`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from data.keyed import rng
from models.initialise import initialise
from pretrain.encoders.frozen import computing_in, fingerprint_prepared, freeze
from pretrain.encoders.preprocessing import Preprocessing


@dataclass(frozen=True)
class TileEncoder:
    """A network, its preprocessing and its name; making one freezes the network, on its device.

    ``features`` are those (B, width) of a network and normalised images (B, 3, S, S): `class_token` for the project's
    own encoders, timm's pooled ones for timm's. ``make_random`` makes the network with random weights of a seed.
    """

    module: nn.Module
    features: Callable[[nn.Module, Tensor], Tensor]
    preprocessing: Preprocessing
    name: str
    source: str
    width: int
    device: torch.device
    precision: str
    make_random: Callable[[int], nn.Module]

    def __post_init__(self) -> None:
        freeze(self.module, self.device)

    @cached_property
    def hash(self) -> str:
        """What it is: two embeddings made with the same hash were made the same way."""
        return fingerprint_prepared(self.module, self.preprocessing, self.precision)

    @property
    def image_size(self) -> int:
        """Pixels a side that the network gets."""
        return self.preprocessing.image_size

    @torch.inference_mode()
    def start(self, images: Tensor) -> Callable[[], Tensor]:
        """Begin to embed images of one size, uint8 (B, H, W, 3); call what it returns for the features, float32 (B,
        width) on the CPU.

        On a GPU this returns at once, so that the next images can be brought meanwhile.
        """
        x = self.preprocessing(images.to(self.device, non_blocking=True))
        with computing_in(self.precision, self.device):
            features = self.features(self.module, x).float()
        if self.device.type != "cuda":
            return features.cpu
        there = features.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> Tensor:
            copied.synchronize()
            return there

        return wait

    def embed(self, images: Tensor) -> Tensor:
        """Features of images of one size: uint8 (B, H, W, 3) → float32 (B, width), on the CPU."""
        return self.start(images)()

    def embed_each(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features of n images of any sizes, each uint8 (H, W, 3): float32 (n, width). Equal sizes go through
        together."""
        features = np.empty((len(images), self.width), dtype=np.float32)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(index)
        for chosen in by_shape.values():
            features[chosen] = self.embed(torch.from_numpy(np.stack([images[i] for i in chosen]))).numpy()
        return features

    def random_twin(self, seed: int) -> "TileEncoder":
        """The same architecture and preprocessing with random weights, drawn from ``seed`` and nothing else."""
        module = self.make_random(int(rng(seed, "random weights").integers(2**62)))
        return replace(self, module=module, name=f"{self.name}, random weights", source=f"random weights, seed {seed}")


def class_token(network: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) → the class token after the final norm (B, width)."""
    return network.features(images)[0]  # type: ignore[operator]


def initialised(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """Networks of ours, which ``make`` makes without values, with random weights of a seed."""

    def of_seed(seed: int) -> nn.Module:
        network = make()
        initialise(network, seed, "encoder")
        return network

    return of_seed
