"""The tile encoder: one vision transformer for every published recipe.

Parameter names are timm's, so a state dict is an export. The architecture is DINOv2's (Oquab et al. 2023, §5 and
appendix B): pre-norm blocks with layer scale, an MLP or SwiGLU feed-forward, optional registers (Darcet et al. 2023), a
mask token, position embeddings interpolated to each crop size, and stochastic depth that skips samples instead of
multiplying them by zero. DINOv3's parts (Siméoni et al. 2025) are settings of it: rotary positions, keys without bias,
and last norms of class tokens' own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.allowed import Agreements, idle_where, one_of, within
from models.attention import QKV_BIASES, Attention, Shape, backend, check_heads
from models.operations import Operations, linear_maps, total_operations
from models.positions import check_sines, grid_embedding
from models.recomputed import GELU, SWIGLU, add_linear, take_rows
from models.rotary import Turns, check_turns, turns_of_grid

POSITIONS = ("learned", "sincos", "rope")


class Tokens(NamedTuple):
    """What the encoder says about a batch of equal-sized crops, after the last norm."""

    cls: Tensor  # (B, width)
    registers: Tensor  # (B, registers, width); none where only some tokens were asked for
    patches: Tensor  # (B, rows * columns, width), the visible ones alone, or (M, width): those that were asked for


@dataclass
class KeptSamples:
    """The samples that one residual branch runs on; all the others pass it by (stochastic depth)."""

    rows: Tensor  # (T',) int64: the kept samples' tokens in the packed sequence
    shapes: list[Shape]  # their crops and tokens, per crop size
    scales: list[float]  # per crop size, samples / kept samples, which leaves the expectation as it was
    chosen: Tensor | None = None  # (R,) int64: of which of the T' tokens there are results; None: all
    chosen_scale: Tensor | None = None  # (R, 1): theirs

    @property
    def groups(self) -> list[tuple[int, float]]:
        """Per crop size, its tokens in ``rows`` and their scale."""
        return [(crops * tokens, scale) for (crops, tokens), scale in zip(self.shapes, self.scales, strict=True)]

    def among(self, wanted: Tensor, length: int) -> "KeptSamples":
        """The same samples, but results for the ``wanted`` rows ``(R,)`` alone.

        The packed sequence has ``length`` rows. How many are both kept and wanted depends on the draw, and no GPU is
        asked for it: a wanted row that isn't kept gets any token's result, times 0.
        """
        place = wanted.new_full((length,), -1)
        place.index_copy_(0, self.rows, torch.arange(len(self.rows), device=wanted.device))
        places = place.index_select(0, wanted)
        chosen = places.clamp(min=0)
        scale = self.scale().index_select(0, chosen) * (places >= 0).unsqueeze(1)
        return replace(self, chosen=chosen, chosen_scale=scale)

    def scale(self) -> Tensor:
        """``(T', 1)``: that of each of ``rows``."""
        return torch.cat([torch.full((size, 1), scale, device=self.rows.device) for size, scale in self.groups])


class MLP(nn.Module):
    """``fc2(GELU(fc1(x)))``."""

    activation = GELU

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation[0](self.fc1(x)))


class SwiGLU(nn.Module):
    """``fc2(SiLU(a) * b)`` with ``a, b = fc1(x)`` (Shazeer 2020): timm's packed layout, DINOv2's ``w12`` and ``w3``."""

    activation = SWIGLU

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation[0](self.fc1(x)))


def _is_listened_to(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's ``forward``."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)


class LayerScale(nn.Module):
    """``gamma * x`` per channel (Touvron et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``, on a packed sequence."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        feed_forward: type[MLP] | type[SwiGLU],
        scaled: bool,
        attention: str,
        qkv_bias: str = "all",
        norm_epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_epsilon)
        self.attn = Attention(width, heads, backend(attention), qkv_bias)
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=norm_epsilon)
        self.mlp = feed_forward(width, hidden)
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def forward(
        self,
        x: Tensor,
        shapes: list[Shape],
        kept: tuple[KeptSamples, KeptSamples] | None = None,
        wanted: Tensor | None = None,
        turns: Sequence[Turns] | None = None,
    ) -> Tensor:
        """``(T, width)`` → ``(T, width)``; ``kept`` names the samples that see each of the two branches (None: all).

        ``wanted`` ``(R,)``: the rows of which the result is wanted, ``(R, width)`` then, and ``kept`` is among them
        (`KeptSamples.among`). The others are keys and values, and nothing more of them is computed. ``turns``: of
        rotary positions, for each of ``shapes``.
        """
        if wanted is not None or not self._is_as_made(x):
            return self._by_modules(x, shapes, kept, wanted, turns)
        gammas = [getattr(scale, "gamma", None) for scale in (self.ls1, self.ls2)]
        if kept is None:
            x = add_linear(x, self.attn.attended(self.norm1(x), shapes, turns), self.attn.proj, gammas[0])
            return add_linear(x, [self.mlp.fc1(self.norm2(x))], self.mlp.fc2, gammas[1], self.mlp.activation)
        first, second = kept
        x, seen = take_rows(x, first.rows)
        attended = self.attn.attended(self.norm1(seen), first.shapes, turns)
        x = add_linear(x, attended, self.attn.proj, gammas[0], rows=first.rows, groups=first.groups)
        x, seen = take_rows(x, second.rows)
        hidden = [self.mlp.fc1(self.norm2(seen))]
        return add_linear(
            x, hidden, self.mlp.fc2, gammas[1], self.mlp.activation, rows=second.rows, groups=second.groups
        )

    def _is_as_made(self, x: Tensor) -> bool:
        """Whether a branch's end does what its modules would: they are ours, nobody's hooks wait for their calls, and
        nothing casts them. Else they are called: adapters, quantised maps, whoever looks at attention."""
        ends = (
            (self.attn, Attention),
            (self.attn.proj, nn.Linear),
            (self.mlp, type(self.mlp)),
            (self.mlp.fc2, nn.Linear),
        )
        scales = ((scale, type(scale)) for scale in (self.ls1, self.ls2))
        return (
            type(self.mlp) in (MLP, SwiGLU)
            and all(kind in (LayerScale, nn.Identity) for kind in (type(self.ls1), type(self.ls2)))
            and all(type(module) is kind and not _is_listened_to(module) for module, kind in (*ends, *scales))
            and self.attn.proj.bias is not None
            and self.mlp.fc2.bias is not None
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _by_modules(
        self,
        x: Tensor,
        shapes: list[Shape],
        kept: tuple[KeptSamples, KeptSamples] | None,
        wanted: Tensor | None,
        turns: Sequence[Turns] | None,
    ) -> Tensor:
        """The same, module by module."""
        past = x if wanted is None else x.index_select(0, wanted)
        if kept is None:
            x = past + self.ls1(self.attn(self.norm1(x), shapes, wanted, turns))
            return x + self.ls2(self.mlp(self.norm2(x)))
        first, second = kept
        part = self.ls1(self.attn(self.norm1(x.index_select(0, first.rows)), first.shapes, first.chosen, turns))
        if wanted is None:
            x = x.index_add(0, first.rows, (part * first.scale().to(part.dtype)).to(x.dtype))
            part = self.ls2(self.mlp(self.norm2(x.index_select(0, second.rows))))
            return x.index_add(0, second.rows, (part * second.scale().to(part.dtype)).to(x.dtype))
        assert first.chosen_scale is not None and second.chosen_scale is not None
        x = past + part * first.chosen_scale.to(part.dtype)
        return x + self.ls2(self.mlp(self.norm2(x))) * second.chosen_scale.to(part.dtype)

    def operations(self, shapes: Sequence[Shape], rows: float | None = None) -> Operations:
        """Of a pass over crops of ``shapes``, of which the results of so many ``rows`` are wanted (None: all)."""
        tokens = sum(crops * length for crops, length in shapes)
        rows = tokens if rows is None else rows
        found = (
            linear_maps(tokens, self.attn.qkv)
            + self.attn.products(shapes)
            + linear_maps(rows, self.attn.proj, self.mlp)
        )
        return replace(found, full=found.forward)  # a checkpointed block is computed anew to its end


class PatchEmbedding(nn.Module):
    """Non-overlapping patches through one linear map: ``(B, 3, H, W)`` → ``(B, H/p * W/p, width)``, row by row."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        # A strided convolution whose kernel is its stride is a matrix product over patches, and faster as one.
        p = self.patch_size
        b, c, h, w = images.shape
        patches = images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), -1)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def resample_positions(positions: Tensor, rows: int, columns: int, *, antialias: bool, offset: float) -> Tensor:
    """Position embeddings of a square grid ``(1, grid², width)``, bicubically on another one: ``(1, rows * columns,
    width)``.

    With an ``offset`` the scale is ``(rows + offset) / grid`` instead of the ratio of the sizes, as DINOv2's first
    release has it against a floating-point floor.
    """
    grid = math.isqrt(positions.shape[1])
    wide = positions if positions.dtype == torch.float64 else positions.float()
    square = wide.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if offset:
        scale = [(rows + offset) / grid, (columns + offset) / grid]
        resampled = F.interpolate(square, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        resampled = F.interpolate(square, (rows, columns), mode="bicubic", antialias=antialias)
    return resampled.permute(0, 2, 3, 1).flatten(1, 2)


def check_patches(image_size: int, patch_size: int) -> None:
    """Raise ValueError for an image that patches don't fill."""
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not divisible by patch_size {patch_size}")


def check_positions(position_embedding: str, width: int) -> None:
    """Raise ValueError for a width that sines and cosines of two coordinates don't fill."""
    if position_embedding == "sincos":
        check_sines(width)


def check_rescale(position_embedding: str, position_rescale: float) -> None:
    """Raise ValueError for a rescaling of coordinates that nothing depends on."""
    if position_rescale != 1 and position_embedding != "rope":
        raise ValueError("position_rescale is of rotary positions: set position_embedding=rope, or position_rescale=1")


class VisionTransformer(nn.Module):
    """A ViT over packed crops of several sizes. Keyword arguments are its settings (``configs/model/``).

    ``feed_forward`` is ``mlp`` or ``swiglu``; ``feed_forward_width`` is the width after the non-linearity;
    ``layer_scale`` is the initial gamma, 0 for none; ``drop_path`` the share of samples that skip a residual branch,
    the same for every block as in DINOv2, or with ``drop_path_rising`` the last block's, growing linearly from 0 at the
    first (`drop_rates`). Position embeddings are a ``image_size / patch_size`` grid, resampled
    bicubically to other sizes: with ``position_antialias`` and offset 0 as the register models have it, or with
    ``position_offset=0.1`` as the first DINOv2 release does. ``position_embedding`` is ``learned``, or ``sincos`` for
    MAE's fixed sines and cosines, or ``rope`` for DINOv3's rotary ones, which have no grid: see `models.rotary`;
    ``position_rescale`` is for whoever trains it, see `pretrain.objectives.position_scales`. ``qkv_bias`` says which of
    queries, keys and values have a bias. Class tokens and registers go through a last norm of their own with
    ``own_cls_norm``, and while training those of all crop sizes but the first through yet another with
    ``own_local_cls_norm``. ``attention`` names the kernel: see `models.attention`.

    Raises ValueError for a width that the heads don't divide, an image that the patches don't fill, or a kernel that
    can't run here.
    """

    agreements: ClassVar[Agreements] = {
        ("width", "heads"): check_heads,
        ("image_size", "patch_size"): check_patches,
        ("position_embedding", "width"): check_positions,
        ("position_embedding", "width", "heads"): check_turns,
        ("position_embedding", "position_rescale"): check_rescale,
    }

    def __init__(
        self,
        *,
        image_size: Annotated[int, within(least=1)] = 224,
        patch_size: Annotated[int, within(least=1)] = 14,
        width: Annotated[int, within(least=1)] = 384,
        depth: Annotated[int, within(least=1)] = 12,
        heads: Annotated[int, within(least=1)] = 6,
        feed_forward: Annotated[str, one_of("mlp", "swiglu")] = "mlp",
        feed_forward_width: Annotated[int, within(least=1)] = 1536,
        registers: Annotated[int, within(least=0)] = 0,
        layer_scale: Annotated[float, within(least=0)] = 1e-5,
        drop_path: Annotated[float, within(least=0, below=1)] = 0.0,
        drop_path_rising: Annotated[bool, idle_where("drop_path", 0)] = False,
        position_antialias: Annotated[bool, idle_where("position_embedding", "rope")] = True,
        position_offset: Annotated[float, within(least=0, below=1), idle_where("position_embedding", "rope")] = 0.0,
        position_embedding: Annotated[str, one_of(*POSITIONS)] = "learned",
        position_rescale: Annotated[float, within(least=1)] = 1.0,
        qkv_bias: Annotated[str, one_of(*QKV_BIASES)] = "all",
        norm_epsilon: Annotated[float, within(above=0)] = 1e-6,
        own_cls_norm: bool = False,
        own_local_cls_norm: bool = False,
        attention: Annotated[str, one_of("sdpa", "xformers")] = "sdpa",
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        check_patches(image_size, patch_size)
        check_positions(position_embedding, width)
        if feed_forward not in ("mlp", "swiglu"):
            raise ValueError(f"feed_forward is 'mlp' or 'swiglu', not {feed_forward!r}")
        if position_embedding not in POSITIONS:
            raise ValueError(f"position_embedding is one of {', '.join(POSITIONS)}, not {position_embedding!r}")
        check_turns(position_embedding, width, heads)
        check_rescale(position_embedding, position_rescale)
        self.image_size, self.patch_size, self.width, self.heads = image_size, patch_size, width, heads
        self.feed_forward, self.layer_scale, self.drop_path = feed_forward, layer_scale, drop_path
        rising = [i / max(1, depth - 1) for i in range(depth)] if drop_path_rising else [1.0] * depth
        self.drop_rates = tuple(drop_path * share for share in rising)
        self.position_antialias, self.position_offset = position_antialias, position_offset
        self.position_embedding, self.position_rescale = position_embedding, position_rescale
        self.qkv_bias, self.norm_epsilon = qkv_bias, norm_epsilon
        self.grid = image_size // patch_size
        self.patch_embed = PatchEmbedding(patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.reg_token = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.pos_embed = None
        if position_embedding != "rope":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, width))  # the class token's position first
            self.pos_embed.requires_grad_(position_embedding == "learned")
        mlp = MLP if feed_forward == "mlp" else SwiGLU
        self.blocks = nn.ModuleList(
            Block(width, heads, feed_forward_width, mlp, layer_scale > 0, attention, qkv_bias, norm_epsilon)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_epsilon)
        self.cls_norm = nn.LayerNorm(width, eps=norm_epsilon) if own_cls_norm else None
        self.local_cls_norm = nn.LayerNorm(width, eps=norm_epsilon) if own_local_cls_norm else None

    def units(self) -> list[nn.Module]:
        """What is gathered, recomputed and compiled by itself, in the order in which it runs: see
        `pretrain.training.sharding`."""
        return list(self.blocks)

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return 1 + (0 if self.reg_token is None else self.reg_token.shape[1])

    def tokens_per_crop(self, size: int) -> int:
        """Tokens of a square crop of ``size`` pixels, class token and registers included."""
        return self.prefix + (size // self.patch_size) ** 2

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        kept: Sequence[tuple[KeptSamples, KeptSamples] | None] | None = None,
        visible: Sequence[Tensor | None] | None = None,
        wanted: Sequence[Tensor | None] | None = None,
        scales: Sequence[float] | None = None,
    ) -> list[Tokens]:
        """Encode batches of crops of different sizes in one pass.

        ``crops``: normalised images, each ``(B_i, 3, H_i, W_i)``. ``masks``: per batch a bool ``(B_i, patches)`` whose
        true patches are replaced by the mask token, or None. ``kept``: per block, the samples that its two branches run
        on (see `KeptSamples`); None runs them all. ``visible``: per batch an int64 ``(B_i, n)`` of the patches that are
        encoded at all (MAE's), in that order, or None for all. ``wanted``: per batch an int64 ``(M_i,)`` of the patches
        whose tokens the caller reads beside the class tokens', numbered through all its crops, or None for no patch at
        all; the last block then computes no more than these, with the same result, and `Tokens.patches` holds them one
        behind the other, ``(M_i, width)``. ``scales``: per batch what the coordinates of rotary positions are multiplied
        by; None: nothing.

        Raises ValueError for ``visible`` patches with rotary positions.
        """
        masks = masks if masks is not None else [None] * len(crops)
        embedded = [self.embed(images, mask) for images, mask in zip(crops, masks, strict=True)]
        if visible is not None:
            embedded = [
                tokens if chosen is None else self._choose(tokens, chosen)
                for tokens, chosen in zip(embedded, visible, strict=True)
            ]
        shapes = [(tokens.shape[0], tokens.shape[1]) for tokens in embedded]
        x = torch.cat([tokens.flatten(0, 1) for tokens in embedded])
        rows = None if wanted is None else self._wanted_rows(shapes, wanted, x.device)
        turns = None
        if self.position_embedding == "rope":
            if visible is not None:
                raise ValueError("with rotary positions all patches are encoded: a part of them has no grid")
            turns = self._turns(crops, scales or [1.0] * len(crops), x)
        for i, block in enumerate(self.blocks):
            branches, these = None if kept is None else kept[i], None
            if rows and i == len(self.blocks) - 1:
                these = torch.cat(rows)
                branches = branches and (branches[0].among(these, len(x)), branches[1].among(these, len(x)))
            x = block(x, shapes, branches, these) if turns is None else block(x, shapes, branches, these, turns)
        x = self._normed(x, shapes, rows)
        if rows is not None:
            groups = iter(x.split([len(part) for part in rows]))
            return [
                Tokens(cls, cls.new_empty(len(cls), 0, self.width), patches)
                for cls, patches in zip(groups, groups, strict=True)
            ]
        parts = x.split([count * tokens for count, tokens in shapes])
        return [self._split(part.view(*shape, -1)) for part, shape in zip(parts, shapes, strict=True)]

    def operations(
        self,
        shapes: Sequence[Shape],
        kept: Sequence[Sequence[Shape]] | None = None,
        wanted: Sequence[float] | None = None,
        patches: int | None = None,
    ) -> Operations:
        """Of a pass over crops of ``shapes``, class token and registers included.

        ``kept``: by block of each shape, what a residual branch runs on; ``wanted``: how many of its tokens are wanted of the
        last block; ``patches``: how many are embedded, where not all of them are encoded. None: all.
        """
        embedded = sum(crops * (tokens - self.prefix) for crops, tokens in shapes) if patches is None else patches
        run = [shapes] * len(self.blocks) if kept is None else kept
        rows = None if wanted is None else sum(wanted)
        *before, last = (block for block in self.blocks if isinstance(block, Block))
        blocks = total_operations(block.operations(of_block) for block, of_block in zip(before, run, strict=False))
        blocks += last.operations(run[-1], rows)
        return linear_maps(embedded, self.patch_embed, of_data=True) + blocks

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 3, H, W)`` normalised images → class token ``(B, width)`` and patch tokens ``(B, patches, width)``."""
        (tokens,) = self([images])
        return tokens.cls, tokens.patches

    def embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Images → ``(B, prefix + patches, width)``: patches (masked ones replaced), class token, positions,
        registers."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"an image of {height} × {width} pixels is not filled by patches of patch_size {self.patch_size}"
            )
        rows, columns = height // self.patch_size, width // self.patch_size
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        token: Tensor = self.cls_token
        if self.pos_embed is not None:
            cls, position = self.positions(rows, columns)
            token, x = token + cls, x + position.to(x.dtype)
        head = [token.to(x.dtype).expand(len(x), -1, -1)]
        if self.reg_token is not None:
            head.append(self.reg_token.to(x.dtype).expand(len(x), -1, -1))
        return torch.cat([*head, x], dim=1)

    def positions(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Position embeddings of the class token ``(1, 1, width)`` and of a grid ``(1, rows * columns, width)``, where
        they aren't rotary."""
        assert self.pos_embed is not None
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if rows == columns == self.grid:
            return cls, patches
        return cls, resample_positions(
            patches, rows, columns, antialias=self.position_antialias, offset=self.position_offset
        )

    def _turns(self, crops: Sequence[Tensor], scales: Sequence[float], x: Tensor) -> list[Turns]:
        grids = [(images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size) for images in crops]
        head_width = self.width // self.heads
        return [
            turns_of_grid(*grid, head_width, scale, x.device, x.dtype)
            for grid, scale in zip(grids, scales, strict=True)
        ]

    def _normed(self, x: Tensor, shapes: list[Shape], rows: list[Tensor] | None) -> Tensor:
        """The last norm of the packed sequence, or of what the last block was asked for, class tokens' own included."""
        normed = self.norm(x)
        if self.cls_norm is None and self.local_cls_norm is None:
            return normed
        start = 0
        for i, (crops, tokens) in enumerate(shapes):
            norm = self.local_cls_norm if i and self.training and self.local_cls_norm is not None else self.cls_norm
            prefix, of_crop = (self.prefix, tokens) if rows is None else (1, 1)
            if norm is not None:
                places = torch.arange(start, start + crops * of_crop, device=x.device).view(crops, of_crop)
                places = places[:, :prefix].flatten()
                normed = normed.index_copy(0, places, norm(x.index_select(0, places)))
            start += crops * of_crop + (0 if rows is None else len(rows[2 * i + 1]))
        return normed

    def _wanted_rows(self, shapes: list[Shape], wanted: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
        """Rows of the packed sequence: per batch its class tokens ``(B_i,)``, then its wanted patches ``(M_i,)``."""
        rows, offset = [], 0
        for (crops, tokens), patches in zip(shapes, wanted, strict=True):
            rows.append(offset + tokens * torch.arange(crops, device=device))
            numbers = rows[-1][:0] if patches is None else patches
            of_crop = tokens - self.prefix
            rows.append(offset + tokens * (numbers // of_crop) + self.prefix + numbers % of_crop)
            offset += crops * tokens
        return rows

    def _choose(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        patches = tokens[:, self.prefix :].gather(1, chosen.unsqueeze(-1).expand(-1, -1, self.width))
        return torch.cat([tokens[:, : self.prefix], patches], dim=1)

    def _split(self, x: Tensor) -> Tokens:
        return Tokens(x[:, 0], x[:, 1 : self.prefix], x[:, self.prefix :])

    def initialise(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """DINOv2's initial values, and with rotary positions DINOv3's: see `models.initialise`."""
        leaf = name.rsplit(".", 1)[-1]
        if name in ("cls_token", "reg_token"):
            tensor.normal_(std=0.02 if self.position_embedding == "rope" else 1e-6, generator=generator)
        elif name == "mask_token":
            tensor.zero_()
        elif name == "pos_embed" and self.position_embedding == "sincos":
            tensor.zero_()  # the class token has no place
            tensor[0, 1:] = grid_embedding(self.grid, self.grid, self.width)
        elif name == "pos_embed":
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
        elif name.startswith("patch_embed.proj."):  # torch's default for a convolution: U(±1/√fan_in)
            bound = (3 * self.patch_size**2) ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)
        elif leaf == "gamma":
            tensor.fill_(self.layer_scale)
        elif leaf == "bias":
            tensor.zero_()
        elif "norm" in name and leaf == "weight":
            tensor.fill_(1.0)
        elif leaf == "weight":
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
        else:
            raise KeyError(name)
