"""The decoder of the slide masked autoencoder: from the encoder's visible tiles to predictions for the masked ones.

He et al. 2022 (MAE), on the tiles of a slide instead of the patches of an image: visible tiles are projected and set
back among mask tokens at their places, every place gets its position embedding, and layers that look in both directions
predict the embedding of each masked tile. The published system says nothing about its decoder; this one is apart from
the encoder and is thrown away after pretraining.

Its layers are of the encoder's kind (`SlideNetwork.decoder_layers`). Beside a LongNet its attention is dilated: it sees
all tiles of a slide (about 7,000, up to 60,000), four times as many as the encoder, and dilation is cheaper than full
attention from about 1,500 tokens on; below its first segment length it keeps a full-attention branch anyway.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.longnet import fill_as_released
from models.nearby import Nearby, first_reaches
from models.operations import Operations, linear_maps
from models.packed_slides import summarise
from models.positions import check_sines, position_embedding
from models.sequence_parallel import Group
from models.slide_network import SlideLayers


class SlideDecoder(nn.Module):
    """Predicts the embeddings of masked tiles. Raises ValueError when its width isn't that of sines and cosines.

    ``layers``: its stack of layers, ``width`` wide. ``start``: what a masked tile enters as: "token", one learned
    vector (MAE), or "nearby", that and the visible tiles near it (see `models.nearby`). ``initial_residual``: see
    `LongNet`.
    """

    def __init__(
        self,
        *,
        encoder_width: int,
        output_width: int,
        width: int,
        layers: SlideLayers,
        start: str = "token",
        initial_residual: float = 1.0,
    ) -> None:
        super().__init__()
        if start not in ("token", "nearby"):
            raise ValueError(f"a masked tile starts from 'token' or 'nearby', not {start!r}")
        check_sines(width)
        self.width, self.initial_residual = width, initial_residual
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.nearby = Nearby(layers.heads) if start == "nearby" else None
        self.decoder = layers
        self.head = nn.Linear(width, output_width)
        if not self.mask_token.is_meta:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        tiles: Tensor,
        cls: Tensor,
        visible: Tensor,
        masked: Tensor,
        cells: Tensor,
        lengths: Sequence[int],
        visible_lengths: Sequence[int],
        extent: int | None = None,
    ) -> Tensor:
        """Predictions for the masked tiles, (M, output_width).

        tiles: (V, encoder_width) encoded visible tiles. cls: (B, encoder_width). visible: (V,) and masked: (M,) their
        indices among the T tiles of the packed slides, both ascending. cells: (T, 2) of all of them. lengths: all tiles
        per slide; visible_lengths: the visible ones. extent: as in `LongNet.forward`.
        """
        embedded = self.embed(tiles)
        x = self.mask_token.to(embedded.dtype).expand(len(cells), -1).index_copy(0, visible, embedded)
        if self.nearby is not None:
            masked_lengths = [of_slide - seen for of_slide, seen in zip(lengths, visible_lengths, strict=True)]
            near = self.nearby(embedded, cells[visible], cells[masked], visible_lengths, masked_lengths)
            x = x.index_add(0, masked, near)
        x = x + position_embedding(cells, self.width, extent).to(x.dtype)
        tokens = self.embed(cls)
        slides = zip(tokens.split(1), x.split(list(lengths)), strict=True)
        x = torch.cat([part for slide in slides for part in slide])
        with_cls = [n + 1 for n in lengths]
        x, _ = self.decoder(x, with_cls, None, cells=cells)
        return self.head(summarise(x, with_cls)[0][masked])

    def share_slides(self, group: Group) -> None:
        """Let the processes of ``group`` share every slide's tokens. Raises ValueError where that can't be."""
        self.decoder.share_slides(group)

    def operations(self, lengths: Sequence[int], visible_lengths: Sequence[int]) -> Operations:
        """Of a pass over slides of ``lengths`` tiles, ``visible_lengths`` of them visible."""
        seen = sum(visible_lengths)
        found = linear_maps(seen + len(lengths), self.embed) + linear_maps(sum(lengths) - seen, self.head)
        if self.nearby is not None:
            found += self.nearby.operations(self.width, lengths, visible_lengths)
        return found + self.decoder.operations([n + 1 for n in lengths])

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill a full-size CPU tensor with the initial value of parameter ``name``; KeyError when there is none."""
        if name not in self.state_dict():
            raise KeyError(name)
        if name == "nearby.log_reach":
            first_reaches(tensor)
        elif name.startswith("decoder."):
            self.decoder.fill(name, tensor, generator, self.initial_residual)
        else:
            fill_as_released(name, tensor, generator, self.initial_residual)


class LinearPrediction(nn.Module):
    """In the decoder's place where the encoder itself has seen the hidden tiles as mask tokens (Xie et al. 2022, SimMIM):
    one linear map of its outputs (M, encoder_width) at their places → (M, output_width)."""

    def __init__(self, encoder_width: int, output_width: int) -> None:
        super().__init__()
        self.head = nn.Linear(encoder_width, output_width)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.head(tiles)

    def operations(self, tiles: int) -> Operations:
        """Of a pass over so many tiles."""
        return linear_maps(tiles, self.head)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill a full-size CPU tensor with the initial value of parameter ``name``; KeyError when there is none."""
        if name not in self.state_dict():
            raise KeyError(name)
        fill_as_released(name, tensor, generator, 1.0)
