"""Masked modelling with several frozen tile encoders: from one encoder's visible embeddings to all encoders' hidden ones.

    visible tiles, by encoder k ──its projection──▶ shared encoder ──▶ shared decoder ─┬─▶ hidden tiles, by encoder 1
                                                                                      ├─▶ by encoder 2
    k is drawn anew for each step                                                      └─▶ …

After TICON (arXiv 2512.21331), by its description; its loss isn't known, and each encoder's standardised embeddings count
the same here. What comes out for every tile is its embedding in the context of its slide. With one store it is `SlideMAE`.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor

from data.embeddings.sequences import SlideBatch
from data.keyed import rng
from models.allowed import one_of, within
from models.slide_network import SlideNetwork
from pretrain.objectives.interface import Moment
from pretrain.objectives.slide_mae import SlideMAE
from pretrain.objectives.slide_targets import SlideTarget, TileLoss, unchanged


class SlideContext(SlideMAE):
    """Keyword arguments are its settings; see `SlideMAE`. The encoder has an input projection for each store's tile
    encoder, and the decoder's last linear map the rows of an output projection for each."""

    several_stores = True
    learns = "to fill in what several tile encoders say of hidden tiles from what one of them says of visible ones"
    operations = SlideMAE.operations

    def __init__(
        self,
        make_encoder: Callable[[], SlideNetwork],
        *,
        decoder_width: Annotated[int, within(least=1)],
        decoder_depth: Annotated[int, within(least=1)],
        decoder_heads: Annotated[int, within(least=1)],
        decoder_feed_forward_width: Annotated[int, within(least=1)],
        weighting: Annotated[str, one_of("slide", "token")],
        decoder_start: Annotated[str, one_of("token", "nearby")],
    ) -> None:
        super().__init__(
            make_encoder,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            decoder_feed_forward_width=decoder_feed_forward_width,
            weighting=weighting,
            decoder_start=decoder_start,
        )
        self.widths = self.encoder.input_widths
        self.target, self.tile_loss = SlideTarget(of_all, of_all, unchanged), TileLoss(self.each_alike, unchanged)

    @classmethod
    def clusters(cls, settings: object) -> int:
        return 0

    def each_alike(self, prediction: Tensor, wanted: Tensor) -> Tensor:
        """(M, ΣD) twice → (M,): the mean over encoders of the mean squared error over an encoder's dimensions."""
        errors = (prediction - wanted).square().split(self.widths, dim=1)
        return torch.stack([of_encoder.mean(dim=1) for of_encoder in errors]).mean(dim=0)

    def loss(self, batch: tuple[SlideBatch, Tensor], moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, from the one encoder that (seed, step) draws for all of a step."""
        self._draw(moment.seed, moment.step)
        return super().loss(batch, moment)

    def judged(self, batch: SlideBatch) -> dict[str, Tensor]:
        """See `SlideMAE.judged`; the encoder that is the input is drawn for each batch of held-out sequences, the same
        every time."""
        self._draw(0, batch.positions[0])
        return super().judged(batch)

    def _draw(self, *key: int) -> None:
        self.encoder.choose_input(int(rng("input encoder", *key).integers(len(self.widths))))


def of_all(batch: SlideBatch) -> Tensor:
    """(T, ΣD): all stores' standardised embeddings, side by side."""
    stores: Sequence[int] = range(1 + len(batch.further))
    return torch.cat([batch.targets(store) for store in stores], dim=1)
