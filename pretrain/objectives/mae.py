"""Masked autoencoding of tiles (He et al. 2022): predict the pixels of masked patches from the visible ones.

    visible patches ──encoder──▶ tokens ──decoder, mask tokens at the other places──▶ pixels of all patches
                                                                                        │ mean squared error on the masked

One network, no teacher. Set against the public code (facebookresearch/mae): the encoder starts from the initial values
of `VisionTransformer`, the decoder from MAE's.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import numpy as np
from torch import Tensor, nn

from data.keyed import rng
from data.on_device import on_device
from models.allowed import Agreements, within
from models.attention import check_heads
from models.mae import PixelDecoder, kept_patches, normalised, pixels, random_masking
from models.operations import Operations, total_operations
from models.positions import check_sines
from models.vit import VisionTransformer
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.losses.precision import at_least_float32
from pretrain.objectives.tile_batch import TileBatch


class MAE(Objective):
    """The objective. Keyword arguments are its settings (``configs/objective/mae.yaml`` explains each).

    Raises ValueError for an encoder with stochastic depth, which MAE doesn't have, or with rotary positions, which are of
    whole grids.
    """

    reading = "Where objective.norm_pix is set, the mean of each patch as a guess of its pixels would get about 1."
    agreements: ClassVar[Agreements] = {
        ("decoder_width", "decoder_heads"): check_heads,
        ("decoder_width",): check_sines,
    }

    def __init__(
        self,
        make_encoder: Callable[[], VisionTransformer],
        *,
        mask_ratio: Annotated[float, within(above=0, below=1)],
        norm_pix: bool,
        decoder_width: Annotated[int, within(least=1)],
        decoder_depth: Annotated[int, within(least=1)],
        decoder_heads: Annotated[int, within(least=1)],
    ) -> None:
        super().__init__()
        self.encoder = make_encoder()
        if self.encoder.drop_path:
            raise ValueError("MAE pretrains without stochastic depth: set model.drop_path=0")
        if self.encoder.position_embedding == "rope":
            raise ValueError(
                "MAE encodes visible patches alone, and rotary positions are of whole grids: set"
                " model.position_embedding=sincos"
            )
        self.encoder.mask_token.requires_grad_(False)  # masked patches don't enter the encoder
        self.decoder = PixelDecoder(
            encoder_width=self.encoder.width,
            patch_size=self.encoder.patch_size,
            width=decoder_width,
            depth=decoder_depth,
            heads=decoder_heads,
        )
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix

    @classmethod
    def check_views(cls, global_count: int, local_count: int) -> None:
        if (global_count, local_count) != (1, 0):
            raise ValueError(
                "MAE sees one crop of each tile: set data.crops.global_count=1 and data.crops.local_count=0"
            )

    def trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, predicted pixels ``(B, L, p * p * 3)`` and mask ``(B, L)`` of ``images`` ``(B, 3, H, W)``.

        ``noise`` ``(B, L)`` decides what is masked: see `random_masking`. The loss is the mean squared error over the
        masked patches of the batch, each patch's target normalised by itself where ``norm_pix`` says so.
        """
        kept, rank, mask = random_masking(noise, self.mask_ratio)
        (tokens,) = self.encoder([images], visible=[kept])
        prediction = self.decoder(tokens.cls, tokens.patches, rank, images.shape[-2] // self.encoder.patch_size)
        target = pixels(at_least_float32(images), self.encoder.patch_size)
        error = (at_least_float32(prediction) - (normalised(target) if self.norm_pix else target)).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum(), prediction, mask

    def loss(self, batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch of one global crop a tile; what is masked depends on (seed, step, the tile's
        place)."""
        images = batch.crops[0][0]
        patches = batch.masks[0].numel()
        noise = np.stack(
            [
                rng(moment.seed, "masked patches", moment.step, moment.first + i).random(patches, np.float32)
                for i in range(len(images))
            ]
        )
        loss, _, _ = self(images, on_device(noise, images.device))
        return loss, {}

    def operations(self, parts: Sequence[TileBatch]) -> Operations:
        return total_operations(self._operations(*part.masks.flatten(1).shape) for part in parts)

    def _operations(self, images: int, patches: int) -> Operations:
        seen = kept_patches(patches, self.mask_ratio)
        encoded = self.encoder.operations([(images, self.encoder.prefix + seen)], patches=images * patches)
        return encoded + self.decoder.operations(images, seen, patches)
