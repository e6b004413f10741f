"""The slide encoder with distance-biased attention: a ViT over the tiles of packed slides, without absolute positions.

    tile embeddings ─linear, GELU─▶ + class token and registers ─▶ pre-norm blocks, biased attention ─▶ norm

MOOZY's (arXiv 2603.27048) by its published numbers, written from its description: ALiBi in two dimensions (see
`models.distance_attention`), no layer scale, stochastic depth. Slopes may be learned, and attention may have a reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.allowed import Agreements, one_of, within
from models.attention import check_heads
from models.distance_attention import (
    DistanceLayout,
    alibi_slopes,
    check_reach,
    distance_attention,
    lay_out_tokens,
    seen_pairs,
)
from models.longnet import drop_path, dropout, in_pieces
from models.operations import Operations, attention_products, linear_maps, total_operations
from models.packed_slides import prepend, summarise
from models.sequence_parallel import Group, TokenShare
from models.slide_network import SlideFeatures, SlideLayers, SlideNetwork, require_packed, stacked_layers

SLOPES = ("fixed", "learned")


class SlideViT(SlideNetwork):
    """The slide encoder. ``input_width`` is the tile encoder's; keyword arguments are its settings
    (``configs/model/``).

    ``slopes``: how fast a head's attention falls with distance, "fixed" as in ALiBi, or "learned" from there on, by
    each layer's heads. ``reach``: cells beyond which a tile sees no other, one number for all heads or one for each;
    None: none. ``dropout`` is the feed-forward's. ``drop_path`` is the last layer's rate; it grows linearly from 0 at
    the first. ``initial_residual``: what the last matrix of each residual branch is multiplied by at the start.

    Raises ValueError where the heads don't divide the width, or reaches are neither one nor as many as heads.
    """

    agreements: ClassVar[Agreements] = {("width", "heads"): check_heads, ("reach", "heads"): check_reach}
    sees_empty_cells = True
    shares_slides = False

    def __init__(
        self,
        input_width: int,
        *,
        width: Annotated[int, within(least=1)],
        depth: Annotated[int, within(least=1)],
        heads: Annotated[int, within(least=1)],
        feed_forward_width: Annotated[int, within(least=1)],
        registers: Annotated[int, within(least=0)],
        slopes: Annotated[str, one_of(*SLOPES)],
        reach: Annotated[list[float] | None, within(above=0)],
        dropout: Annotated[float, within(least=0, below=1)],
        drop_path: Annotated[float, within(least=0, below=1)],
        initial_residual: Annotated[float, within()] = 1.0,
    ) -> None:
        super().__init__()
        self.input_width, self.width, self.initial_residual = input_width, width, initial_residual
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(input_width, width)})
        self.cls_token = nn.Parameter(torch.empty(1, width))
        self.reg_token = nn.Parameter(torch.empty(registers, width)) if registers else None
        self.mask_token = nn.Parameter(torch.empty(1, width))
        layers = DistanceLayerSettings(
            width, heads, feed_forward_width, 1 + registers, slopes, tuple(reach or ()), dropout, drop_path
        )
        self.encoder: DistanceLayers = DistanceLayers(layers, depth)
        for token in (self.cls_token, self.reg_token, self.mask_token):
            if token is not None and not token.is_meta:
                nn.init.zeros_(token)

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
        """Encode packed slides; see `SlideNetwork.forward`.

        cells: (T, 2) in units of a tile's side, whole or not, from anywhere; ``extent`` isn't needed. masked: (T,) bool
        of the tiles whose projection the mask token replaces. valid: (T,) bool, False for cells without a tile: they
        see none but themselves, nothing sees them, and means leave them out. valid_lengths: how many are valid of each
        slide; where it isn't said, a GPU is waited for.
        """
        require_packed(tokens, cells, lengths)
        x = F.gelu(self.project(tokens))
        if masked is not None:
            assert self.mask_token is not None
            x = torch.where(masked[:, None], self.mask_token.to(x.dtype), x)
        first = self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token])
        x, states = self.encoder(
            prepend(first, x, lengths),
            [n + len(first) for n in lengths],
            seeds,
            all_layers,
            cells,
            valid,
            valid_lengths,
        )
        tiles, cls, means = summarise(x, [n + len(first) for n in lengths], len(first), valid)
        return SlideFeatures(tiles, cls, means, *stacked_layers(states, self.encoder.norm))

    def operations(self, lengths: Sequence[int]) -> Operations:
        """Of a pass over slides of ``lengths`` tiles."""
        embedded = linear_maps(sum(lengths) / len(self.patch_embed), self.patch_embed, of_data=True)
        return embedded + self.encoder.operations([n + self.encoder.special for n in lengths])

    def decoder_layers(self, width: int, depth: int, heads: int, feed_forward_width: int) -> "DistanceLayers":
        """Blocks with the encoder's kind of slopes, and the farthest reach of its heads."""
        own = self.encoder.settings
        farthest = (max(own.reach),) if own.reach else ()
        return DistanceLayers(DistanceLayerSettings(width, heads, feed_forward_width, 1, own.slopes, farthest), depth)

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """MOOZY's first values of tokens, and DINOv2's of matrices; see `models.initialise`."""
        if name not in self.state_dict():
            raise KeyError(name)
        if name == "cls_token":
            tensor.normal_(std=1e-6, generator=generator)
        elif name == "reg_token":
            tensor.normal_(std=0.02, generator=generator)
        elif name == "mask_token":
            tensor.zero_()
        else:
            self.encoder.fill(name, tensor, generator, self.initial_residual)


@dataclass(frozen=True)
class DistanceLayerSettings:
    """What the blocks of a stack have in common; see `SlideViT`. ``special``: class token and registers."""

    width: int
    heads: int
    feed_forward_width: int
    special: int
    slopes: str
    reach: tuple[float, ...]
    dropout: float = 0.0
    drop_path: float = 0.0


class DistanceLayers(SlideLayers):
    """A stack of pre-norm blocks and a final norm: the body of the encoder, and of a decoder beside it."""

    def __init__(self, settings: DistanceLayerSettings, depth: int) -> None:
        super().__init__()
        check_heads(settings.width, settings.heads)
        check_reach(settings.reach, settings.heads)
        self.settings, self.heads, self.special = settings, settings.heads, settings.special
        rates = (settings.drop_path * index / max(1, depth - 1) for index in range(depth))
        self.blocks = nn.ModuleList(
            DistanceBlock(replace(settings, drop_path=rate), index) for index, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(settings.width)

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def share_slides(self, group: Group) -> None:
        if group is not None:
            raise ValueError("SlideViT can't share a slide over processes; 1 gives each process slides of its own")

    def forward(
        self,
        x: Tensor,
        lengths: Sequence[int],
        seeds: Sequence[int] | None,
        all_layers: bool = False,
        cells: Tensor | None = None,
        valid: Tensor | None = None,
        valid_lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """See `SlideLayers.forward`; ``valid`` and ``valid_lengths`` as in `SlideViT.forward`."""
        assert cells is not None
        layout = lay_out_tokens(cells, lengths, self.special, self.settings.reach, valid, valid_lengths)
        share = TokenShare(tuple(lengths))
        states = [summarise(x, lengths, self.special, valid)[1:]] if all_layers else []
        for block in self.blocks:
            x = block(x, layout, share, seeds)
            if all_layers:
                states.append(summarise(x, lengths, self.special, valid)[1:])
        return self.norm(x), states

    def operations(self, lengths: Sequence[int]) -> Operations:
        """Of a pass over sequences of ``lengths`` tokens; within a reach, an estimate."""
        pairs = seen_pairs(lengths, self.special, self.settings.reach, self.heads)
        return total_operations(
            block.operations(sum(lengths), pairs) for block in self.blocks if isinstance(block, DistanceBlock)
        )

    def fill(self, name: str, tensor: Tensor, generator: torch.Generator, initial_residual: float) -> None:
        """Matrices normal with σ = .02, those that end a branch times ``initial_residual``; norms at 1, biases at 0,
        slopes as ALiBi's."""
        if name.endswith("log_slopes"):
            tensor.copy_(alibi_slopes(len(tensor)).log())
        elif tensor.ndim == 2:
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
            if name.endswith((".proj.weight", ".fc2.weight")) and "blocks" in name:
                tensor.mul_(initial_residual)
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)


class DistanceBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with dropout in the latter and per-slide stochastic depth
    in both, drawn as `LongNet` draws them."""

    def __init__(self, settings: DistanceLayerSettings, index: int) -> None:
        super().__init__()
        width, hidden = settings.width, settings.feed_forward_width
        self.index, self.heads = index, settings.heads
        self.dropout, self.drop_path = settings.dropout, settings.drop_path
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.log_slopes = nn.Parameter(alibi_slopes(self.heads).log()) if settings.slopes == "learned" else None
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, layout: DistanceLayout, share: TokenShare, seeds: Sequence[int] | None) -> Tensor:
        """(T, width) → (T, width). Without gradients and dropout, the feed-forward takes a piece of the tokens at a
        time."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1)).unbind(1)
        attended = self.proj(distance_attention(q, k, v, layout, self.slopes(x)).flatten(1))
        x = x + drop_path(attended, self.drop_path, share, seeds, f"path attention {self.index}")
        if torch.is_grad_enabled() or seeds is not None:
            hidden = F.gelu(self.fc1(self.norm2(x)))
            hidden = self.fc2(dropout(hidden, self.dropout, share, seeds, f"hidden {self.index}"))
            hidden = dropout(hidden, self.dropout, share, seeds, f"feed-forward {self.index}")
            return x + drop_path(hidden, self.drop_path, share, seeds, f"path feed-forward {self.index}")
        return in_pieces(lambda some: (some + self.fc2(F.gelu(self.fc1(self.norm2(some)))),), x)[0]

    def slopes(self, like: Tensor) -> Tensor:
        """(heads,) at least float32: made here, since sharding would hand tensors that come in down to 16 bits."""
        if self.log_slopes is None:
            return alibi_slopes(self.heads, like.device)
        return self.log_slopes.to(torch.promote_types(like.dtype, torch.float32)).exp()

    def operations(self, tokens: int, pairs: float) -> Operations:
        """Of a pass over so many tokens, with ``pairs`` of them in all heads."""
        found = linear_maps(tokens, self) + attention_products(pairs, self.proj.in_features // self.heads)
        # A checkpointed block is computed anew up to what its backward last asks for: a drawn scale, or fc2's input.
        last = 0.0 if self.dropout or self.drop_path else linear_maps(tokens, self.fc2).forward
        return replace(found, full=found.forward - last)
