"""What slide encoders have in common, and what embeds, probes and trains them may rely on: `LongNet` and `SlideViT`.

    input projection ──▶ a stack of layers over packed slides ──▶ last norm ──▶ `SlideFeatures`

The stack is a network's kind of attention: a decoder that is trained beside an encoder asks it for a smaller stack of
the same kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.operations import Operations
from models.sequence_parallel import Group


class SlideFeatures(NamedTuple):
    """What the encoder says about a packed batch of B slides with T tiles in all."""

    tiles: Tensor  # (T, width) every tile, after all norms
    cls: Tensor  # (B, width) the class tokens, after all norms
    pooled: Tensor  # (B, width) the mean of a slide's tiles; a norm behind the layers' own comes after it
    cls_layers: Tensor | None  # (depth + 1, B, width) class token of the embedding and each layer, last norm alone
    pooled_layers: Tensor | None  # (depth + 1, B, width) the same for the mean of the tiles


class SlideLayers(nn.Module, ABC):
    """A stack of layers over packed slides, each with its class token first: the body of an encoder or a decoder."""

    heads: int

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        lengths: Sequence[int],
        seeds: Sequence[int] | None,
        all_layers: bool = False,
        cells: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(T, width) tokens of slides of ``lengths`` tokens → (T, width), and per state (embedding, then layers) its
        class tokens and mean tiles, (B, width) each, where ``all_layers``.

        seeds: one integer a slide, of its dropout; None: none. cells: (tiles, 2) of the tokens that are tiles.
        """

    def order(self, cells: Tensor | None, lengths: Sequence[int]) -> Tensor | None:
        """The order (T,) in which the stack's units see tokens of sequences of ``lengths``, with tiles at ``cells``;
        None: as they come."""
        return None

    @abstractmethod
    def units(self) -> list[nn.Module]:
        """What is gathered, recomputed and compiled by itself: see `pretrain.training.sharding`."""

    @abstractmethod
    def operations(self, lengths: Sequence[int]) -> Operations:
        """Of a pass over sequences of ``lengths`` tokens."""

    @abstractmethod
    def share_slides(self, group: Group) -> None:
        """Let the processes of ``group`` share every slide's tokens. Raises ValueError where that can't be."""

    @abstractmethod
    def fill(self, name: str, tensor: Tensor, generator: torch.Generator, initial_residual: float) -> None:
        """The first value of parameter ``name`` of the stack; what ends a residual branch is multiplied by
        ``initial_residual``."""


class SlideNetwork(nn.Module, ABC):
    """A slide encoder: packed tile embeddings → `SlideFeatures`."""

    input_width: int  # of the tile encoder's embeddings
    width: int
    initial_residual: float
    encoder: SlideLayers
    sees_empty_cells: ClassVar[bool] = False
    """Whether cells without a tile may be among the tokens, ``valid`` telling them."""
    shares_slides: ClassVar[bool] = True
    """Whether processes can share a slide's tokens: False where `SlideLayers.share_slides` always raises."""
    patch_embed: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.mask_token: nn.Parameter | None = None
        self.further_widths: list[int] = []
        self.chosen_input = 0

    def add_mask_token(self) -> None:
        """Have a mask token, for an objective that shows the encoder all places and hides tiles by it."""
        if self.mask_token is None:
            device = next(self.parameters()).device
            self.mask_token = nn.Parameter(torch.zeros(1, self.width, device=device))

    @property
    def input_widths(self) -> list[int]:
        """Of every tile encoder whose embeddings it takes; the first is ``input_width``."""
        return [self.input_width, *self.further_widths]

    def add_input(self, width: int) -> None:
        """Have an input projection of its own for embeddings of one more tile encoder, beside that in
        ``patch_embed``."""
        self.further_widths.append(width)
        place = next(self.parameters()).device
        self.patch_embed[f"proj{len(self.further_widths)}"] = nn.Linear(width, self.width, device=place)

    def choose_input(self, number: int) -> None:
        """From here on take embeddings of the tile encoder of that number, from 0."""
        self.chosen_input = number

    def project(self, tokens: Tensor) -> Tensor:
        """(T, chosen width) → (T, width) by the projection that is chosen."""
        projected: Tensor = self.patch_embed[f"proj{self.chosen_input or ''}"](tokens)
        return projected

    def standardise_inputs(self, mean: Tensor, std: Tensor) -> None:
        """From here on take embeddings as they are stored, and subtract ``mean`` and divide by ``std`` (input_width,)
        before anything else: for a network that was trained on embeddings so standardised. No part of its weights."""
        if not hasattr(self, "input_mean"):
            self.register_forward_pre_hook(_standardised)
        self.register_buffer("input_mean", mean, persistent=False)
        self.register_buffer("input_std", std, persistent=False)

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        cells: Tensor,
        lengths: Sequence[int],
        seeds: Sequence[int] | None = None,
        all_layers: bool = False,
        extent: int | None = None,
        masked: Tensor | None = None,
        valid: Tensor | None = None,
        valid_lengths: Sequence[int] | None = None,
    ) -> SlideFeatures:
        """Encode packed slides.

        tokens: (T, input_width) tile embeddings, slide after slide. cells: (T, 2) (x, y) in the slide's grid of tiles.
        lengths: tiles per slide. seeds: one integer per slide, from which its dropout and drop-path are drawn; None
        switches both off. all_layers: also collect class token and mean after every layer. extent: a number that all
        cells are below, where it is known. masked: (T,) bool of the tiles whose projection the mask token replaces, see
        `add_mask_token`. valid: (T,) bool, False for cells without a tile, which don't count; where `sees_empty_cells`.
        valid_lengths: how many are valid of each slide, so that no GPU is waited for to count them.
        """

    @abstractmethod
    def operations(self, lengths: Sequence[int]) -> Operations:
        """Of a pass over slides of ``lengths`` tiles."""

    @abstractmethod
    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill a full-size CPU tensor with the initial value of parameter ``name``; KeyError when there is none."""

    @abstractmethod
    def decoder_layers(self, width: int, depth: int, heads: int, feed_forward_width: int) -> SlideLayers:
        """A stack of the encoder's kind of layers for a decoder beside it, of its own size and without dropout."""


def _standardised(network: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((given[0] - network.input_mean) / network.input_std, *given[1:])  # type: ignore[operator]


def require_packed(tokens: Tensor, cells: Tensor, lengths: Sequence[int]) -> None:
    """Raise ValueError unless there are as many tokens and cells as slides of ``lengths`` tiles have."""
    if not len(tokens) == len(cells) == sum(lengths):
        raise ValueError(f"{len(tokens)} tokens, {len(cells)} cells and slides of {list(lengths)} tiles do not agree")


def stacked_layers(
    states: Sequence[tuple[Tensor, Tensor]], norm: nn.Module
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Class tokens and means of a stack's states, each after the last ``norm``: (depth + 1, B, width) twice, None where
    there are no states."""
    if not states:
        return None, None
    cls, means = (torch.stack([norm(one) for one in of_each]) for of_each in zip(*states, strict=True))
    return cls, means
