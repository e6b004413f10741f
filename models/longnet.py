"""The slide encoder: a LongNet over a slide's tile embeddings, with the released Prov-GigaPath names and arithmetic.

Slides are packed, not padded: a batch is one sequence of all their tiles, and ``lengths`` says how many each slide has.
Every slide gets its CLS token in front (which therefore takes slot 0 of its first segment) and position embeddings
computed from its tiles' cells. At the released size the state dict has exactly the released 247 keys (86,330,880
parameters), so ``slide_encoder.pth`` loads and exports strictly.

Sources: Ding et al. 2023 (LongNet), Wang et al. 2022 (sub-LayerNorm), Xu et al. 2024 (Prov-GigaPath).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.allowed import SOME, Agreements, one_of, within
from models.attention import check_heads
from models.attention_kernels import ATTENTION_KERNELS, kernel
from models.dilated_attention import attended_pairs, check_schedule, dilated_attention
from models.operations import Operations, attention_products, linear_maps, total_operations
from models.packed_slides import of_each_token, prepend, summarise
from models.positions import check_sines, position_embedding
from models.sequence_parallel import (
    Group,
    TokenShare,
    check_sharing,
    gather,
    heads_at_hand,
    scatter,
    to_heads,
    to_tokens,
)
from models.slide_network import SlideFeatures, SlideLayers, SlideNetwork, require_packed, stacked_layers
from models.token_order import ORDERS, along_hilbert

# Tokens at a time where no gradient is needed: a layer then holds a slide's input, q, k, v and output, and little else.
PIECE = 4096


class LongNet(SlideNetwork):
    """The slide encoder. ``input_width`` is the tile encoder's; keyword arguments are its settings
    (``configs/model/``).

    ``drop_path`` is the last layer's rate; it grows linearly from 0 at the first. ``compatible`` asks for the released
    model's attention (attended zero padding, constant branch weights in the backward); `load_released` turns it on.
    ``attention`` names the kernel, see `models.attention_statistics`. ``order``: of a slide's tiles in the sequence that
    attention cuts into segments, "rows" as released or "hilbert" (`models.token_order`); what comes in and out is in
    row-major order either way. ``initial_residual``: what the last matrix of each residual branch is multiplied by at
    the start; 1 is the released initialisation, and with 0 every layer begins as the identity.

    Raises ValueError when the widths don't divide, when a ratio doesn't divide its segment length, or for a kernel that
    can't run here.
    """

    agreements: ClassVar[Agreements] = {
        ("width", "heads"): check_heads,
        ("width",): check_sines,
        ("segment_lengths", "dilated_ratios"): check_schedule,
    }

    def __init__(
        self,
        input_width: int,
        *,
        width: Annotated[int, within(least=1)],
        depth: Annotated[int, within(least=1)],
        heads: Annotated[int, within(least=1)],
        feed_forward_width: Annotated[int, within(least=1)],
        segment_lengths: Annotated[list[int], SOME, within(least=1)],
        dilated_ratios: Annotated[list[int], SOME, within(least=1)],
        dropout: Annotated[float, within(least=0, below=1)],
        drop_path: Annotated[float, within(least=0, below=1)],
        compatible: bool,
        attention: Annotated[str, one_of(*ATTENTION_KERNELS)] = "sdpa",
        order: Annotated[str, one_of(*ORDERS)] = "rows",
        initial_residual: Annotated[float, within()] = 1.0,
    ) -> None:
        super().__init__()
        check_sines(width)
        self.input_width, self.width = input_width, width
        self.segment_lengths, self.dilated_ratios = list(segment_lengths), list(dilated_ratios)
        self.attention, self.order, self.initial_residual = attention, order, initial_residual
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(input_width, width)})
        layers = LayerSettings(
            width,
            heads,
            feed_forward_width,
            tuple(segment_lengths),
            tuple(dilated_ratios),
            attention,
            order,
            dropout,
            drop_path,
            compatible,
        )
        self.encoder: Layers = Layers(layers, depth)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if not self.cls_token.is_meta:
            nn.init.normal_(self.cls_token, std=0.02)

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

        tokens: (T, input_width) tile embeddings, slide after slide. cells: (T, 2) integer (x, y) in the slide's grid of
        tiles, from 0. lengths: tiles per slide. seeds: one integer per slide, from which its dropout and drop-path are
        drawn; None switches both off. all_layers: also collect CLS and mean after every layer. extent: a number that all
        cells are below, where it is known: see `position_embedding`. masked: (T,) bool of the tiles whose projection
        the mask token replaces, for a network that was given one; it is no part of the released names. Raises
        ValueError for ``valid``: what has no tile is left out of its sequence.
        """
        require_packed(tokens, cells, lengths)
        if valid is not None:
            raise ValueError("a LongNet sees tiles alone, and no cells without one")
        x = self.project(tokens)
        if masked is not None:
            assert self.mask_token is not None
            x = torch.where(masked[:, None], self.mask_token.to(x.dtype), x)
        x = x + position_embedding(cells, self.width, extent).to(x.dtype)
        x = prepend(self.cls_token[0], x, lengths)
        lengths = [n + 1 for n in lengths]
        x, states = self.encoder(x, lengths, seeds, all_layers, cells)
        tiles, cls, means = summarise(x, lengths)
        return SlideFeatures(self.norm(tiles), self.norm(cls), self.norm(means), *stacked_layers(states, self.norm))

    def operations(self, lengths: Sequence[int]) -> Operations:
        """Of a pass over slides of ``lengths`` tiles."""
        embedded = linear_maps(sum(lengths) / len(self.patch_embed), self.patch_embed, of_data=True)
        return embedded + self.encoder.operations([n + 1 for n in lengths])

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill a full-size CPU tensor with the initial value of parameter ``name``; KeyError when there is none."""
        if name not in self.state_dict():
            raise KeyError(name)
        fill_as_released(name, tensor, generator, self.initial_residual)

    def decoder_layers(self, width: int, depth: int, heads: int, feed_forward_width: int) -> "Layers":
        schedule = tuple(self.segment_lengths), tuple(self.dilated_ratios)
        return Layers(LayerSettings(width, heads, feed_forward_width, *schedule, self.attention, self.order), depth)

    def load_released(self, path: Path | str) -> str:
        """Load a released ``slide_encoder.pth`` (``{"model": state dict}``) and turn the compatible attention on.

        Returns one sentence that says what was loaded and that the attention is now the released one. Raises
        FileNotFoundError when the file is missing, ValueError when its names or shapes are not exactly this encoder's.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such slide encoder; without it the encoder would be random")
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("model") if isinstance(content, dict) else None
        if not isinstance(state, dict):
            raise ValueError(f"{path} is not a released slide encoder: it has no state dict under 'model'")
        own = self.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        wrong = [name for name in own if shapes.get(name) != tuple(own[name].shape)] + [
            n for n in shapes if n not in own
        ]
        if wrong:
            there, here = shapes.get(wrong[0], "missing"), tuple(own[wrong[0]].shape) if wrong[0] in own else "unknown"
            raise ValueError(
                f"{path} does not fit this slide encoder: {len(wrong)} parameters differ, first {wrong[0]} "
                f"({there} in the file, {here} here); set the model's sizes to those of the file"
            )
        self.load_state_dict(state, strict=True, assign=self.cls_token.is_meta)
        self.encoder.set_compatible(True)
        return (
            f"loaded {len(state)} tensors from {path}; attention switched to the released model's "
            "(compatible: zero padding is attended, branch weights are constants in the backward)"
        )


@dataclass(frozen=True)
class LayerSettings:
    """What the layers of a stack have in common. ``drop_path`` is the last layer's rate; it grows linearly from 0 at
    the first."""

    width: int
    heads: int
    feed_forward_width: int
    segment_lengths: tuple[int, ...]
    dilated_ratios: tuple[int, ...]
    attention: str = "sdpa"
    order: str = "rows"
    dropout: float = 0.0
    drop_path: float = 0.0
    compatible: bool = False


class Layers(SlideLayers):
    """A stack of pre-norm layers and a final norm: the body of the encoder, and of the decoder in
    `models.slide_mae`."""

    def __init__(self, settings: LayerSettings, depth: int) -> None:
        super().__init__()
        check_heads(settings.width, settings.heads)
        check_schedule(settings.segment_lengths, settings.dilated_ratios)
        self.heads, self.dropout, self.along = settings.heads, settings.dropout, settings.order
        self.group: Group = None
        rates = (settings.drop_path * index / max(1, depth - 1) for index in range(depth))
        self.layers = nn.ModuleList(Layer(replace(settings, drop_path=rate), index) for index, rate in enumerate(rates))
        self.layer_norm = nn.LayerNorm(settings.width)

    def order(self, cells: Tensor | None, lengths: Sequence[int]) -> Tensor | None:
        if self.along == "rows":
            return None
        assert cells is not None
        return along_hilbert(cells, lengths)

    def units(self) -> list[nn.Module]:
        """What is gathered, recomputed and compiled by itself, in the order in which it runs: see
        `pretrain.training.sharding`."""
        return list(self.layers)

    def set_compatible(self, compatible: bool) -> None:
        """Switch every layer's attention between the exact and the released arithmetic."""
        for module in self.modules():
            if isinstance(module, DilatedSelfAttention):
                module.compatible = compatible

    def share_slides(self, group: Group) -> None:
        """Let the processes of ``group`` each compute a share of every slide's tokens (see `models.sequence_parallel`).

        They are given the same slides, and get the same results. Raises ValueError unless the processes divide the
        heads.
        """
        check_sharing(self.heads, group)
        self.group = group

    def forward(
        self,
        x: Tensor,
        lengths: Sequence[int],
        seeds: Sequence[int] | None,
        all_layers: bool = False,
        cells: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(T, width) → (T, width) after the final norm, and per state (embedding, then layers) its CLS and mean, (B,
        width) each. ``cells`` are looked at for the order alone: tokens carry their positions."""
        share = TokenShare(tuple(lengths), self.group)
        order = self.order(cells, lengths)
        if order is not None:
            x = x.index_select(0, order)
        x = dropout(scatter(x, share), self.dropout, share, seeds, "embedding")
        states = [summarise(gather(x, share), lengths)[1:]] if all_layers else []
        for layer in self.layers:
            x = layer(x, share, seeds)
            if all_layers:
                states.append(summarise(gather(x, share), lengths)[1:])
        x = gather(self.layer_norm(x), share)
        return x if order is None else torch.empty_like(x).index_copy(0, order, x), states

    def operations(self, lengths: Sequence[int]) -> Operations:
        """Of a pass over sequences of ``lengths`` tokens, of all processes that share them."""
        return total_operations(layer.operations(lengths) for layer in self.layers if isinstance(layer, Layer))

    def fill(self, name: str, tensor: Tensor, generator: torch.Generator, initial_residual: float) -> None:
        """The released model's initial values."""
        fill_as_released(name, tensor, generator, initial_residual)


class Layer(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``, each with dropout and per-slide stochastic depth."""

    def __init__(self, settings: LayerSettings, index: int) -> None:
        super().__init__()
        self.index, self.dropout, self.drop_path = index, settings.dropout, settings.drop_path
        self.self_attn = DilatedSelfAttention(settings)
        self.self_attn_layer_norm = nn.LayerNorm(settings.width)
        self.ffn = FeedForward(settings.width, settings.feed_forward_width)
        self.final_layer_norm = nn.LayerNorm(settings.width)

    def forward(self, x: Tensor, share: TokenShare, seeds: Sequence[int] | None) -> Tensor:
        """(t, width) → (t, width), the share's tokens. Without gradients and dropout, a piece of the tokens at a
        time."""
        if torch.is_grad_enabled() or seeds is not None:
            q, k, v = self.self_attn.project(self.self_attn_layer_norm(x))
            attended = self.self_attn.finish(self.self_attn.attend(q, k, v, share))
            x = x + self._regularised(attended, share, seeds, "attention")
            return x + self._regularised(self.ffn(self.final_layer_norm(x)), share, seeds, "feed-forward")
        q, k, v = in_pieces(lambda some: self.self_attn.project(self.self_attn_layer_norm(some)), x)
        attended = self.self_attn.attend(q, k, v, share)
        del q, k, v

        def rest(some: Tensor, attended: Tensor) -> tuple[Tensor]:
            some = some + self.self_attn.finish(attended)
            return (some + self.ffn(self.final_layer_norm(some)),)

        return in_pieces(rest, x, attended)[0]

    def operations(self, lengths: Sequence[int]) -> Operations:
        """Of a pass over sequences of ``lengths`` tokens."""
        attention, tokens = self.self_attn, sum(lengths)
        pairs = attended_pairs(lengths, attention.segment_lengths, attention.dilated_ratios, attention.heads)
        head_width = attention.out_proj.out_features // attention.heads
        found = linear_maps(tokens, self) + attention_products(pairs, head_width)
        # A checkpointed layer is computed anew up to what its backward last asks for: a drawn scale, or fc2's input.
        last = 0.0 if self.dropout or self.drop_path else linear_maps(tokens, self.ffn.fc2).forward
        return replace(found, full=found.forward - last)

    def _regularised(self, x: Tensor, share: TokenShare, seeds: Sequence[int] | None, site: str) -> Tensor:
        x = dropout(x, self.dropout, share, seeds, f"{site} {self.index}")
        return drop_path(x, self.drop_path, share, seeds, f"path {site} {self.index}")


class DilatedSelfAttention(nn.Module):
    """Multi-head dilated attention with a norm before its output projection (sub-LayerNorm), in three steps: `Layer`
    calls each.

    What comes before and after attention looks at one token at a time, and can therefore be done in pieces.
    """

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.segment_lengths, self.dilated_ratios = settings.segment_lengths, settings.dilated_ratios
        self.heads, self.compatible, self.kernel = settings.heads, settings.compatible, kernel(settings.attention)
        width = settings.width
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, width) → q, k, v (t, heads, head_width)."""
        q, k, v = (project(x).unflatten(1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, share: TokenShare) -> Tensor:
        """q, k, v (t, heads, head_width) of the share's tokens → (t, heads, head_width), having seen all tokens."""
        schedule = self.segment_lengths, self.dilated_ratios, self.compatible, self.kernel
        if share.group is None:
            return dilated_attention(q, k, v, share.lengths, *schedule)
        q, k, v = to_heads(torch.stack([q, k, v], dim=1), share).unbind(1)
        out = dilated_attention(q, k, v, share.lengths, *schedule, heads_at_hand(self.heads, share.group))
        return to_tokens(out[:, None], share)[:, 0]

    def finish(self, out: Tensor) -> Tensor:
        """(t, heads, head_width) → (t, width)."""
        return self.out_proj(self.inner_attn_ln(out.flatten(1)))


def in_pieces(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, which looks at one row at a time, computed `PIECE` rows at a time into results of full
    length."""
    results: tuple[Tensor, ...] = ()
    for start in range(0, max(1, len(tensors[0])), PIECE):
        pieces = function(*(x[start : start + PIECE] for x in tensors))
        results = results or tuple(piece.new_empty(len(tensors[0]), *piece.shape[1:]) for piece in pieces)
        for whole, piece in zip(results, pieces, strict=True):
            whole[start : start + PIECE] = piece
    return results


class FeedForward(nn.Module):
    """``fc2(norm(GELU(fc1(x))))``, with GELU in float32 as released."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.ffn_layernorm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        precise = torch.promote_types(x.dtype, torch.float32)
        return self.fc2(self.ffn_layernorm(F.gelu(x.to(precise)).to(x.dtype)))


def dropout(x: Tensor, rate: float, share: TokenShare, seeds: Sequence[int] | None, site: str) -> Tensor:
    """Dropout whose draws for a slide depend on (the slide's seed, the site) alone, not on what else is in the
    batch."""
    if seeds is None or rate == 0:
        return x
    kept = torch.empty_like(x, requires_grad=False)
    sizes = [tokens.stop - tokens.start for _, tokens in share.parts]
    for (number, tokens), part in zip(share.parts, kept.split(sizes), strict=True):
        generator = torch.Generator(x.device).manual_seed(dropout_seed(seeds[number], site))
        slide = part if len(part) == share.lengths[number] else x.new_empty(share.lengths[number], *x.shape[1:])
        slide.bernoulli_(1 - rate, generator=generator)
        if slide is not part:  # other processes hold the rest, and all cut theirs from the same draws
            part.copy_(slide[tokens])
    return x * kept.div_(1 - rate)


def drop_path(x: Tensor, rate: float, share: TokenShare, seeds: Sequence[int] | None, site: str) -> Tensor:
    """Stochastic depth (Huang et al. 2016): a whole slide's branch is dropped with probability ``rate``, or else scaled
    up."""
    if seeds is None or rate == 0:
        return x
    kept = [dropout_seed(seed, site) >= rate * 2**63 for seed in seeds]
    parts = [(kept[number], tokens.stop - tokens.start) for number, tokens in share.parts]
    scaled = x * (1 / (1 - rate))
    if all(there for there, _ in parts):
        return scaled
    there, sizes = zip(*parts, strict=True)
    return scaled * of_each_token(there, sizes, x)[:, None]


def dropout_seed(seed: int, site: str) -> int:
    """63 bits that depend on (seed, site) alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {site}".encode(), digest_size=8).digest(), "big") >> 1


def fill_as_released(name: str, tensor: Tensor, generator: torch.Generator, initial_residual: float) -> None:
    """The released model's initial values: Xavier-uniform matrices, zero biases, norms at 1, tokens normal with σ =
    0.02.

    The matrices that end a residual branch are multiplied by ``initial_residual``.
    """
    if name.endswith("_token"):
        tensor.normal_(std=0.02, generator=generator)
    elif tensor.ndim == 2:
        nn.init.xavier_uniform_(tensor, generator=generator)
        if name.endswith(("self_attn.out_proj.weight", "ffn.fc2.weight")):
            tensor.mul_(initial_residual)
    else:
        tensor.fill_(1.0 if name.endswith("weight") else 0.0)
