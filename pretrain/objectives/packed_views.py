"""An encoder's pass over all crops of a micro-batch in one packed sequence, with stochastic depth; and what it costs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data.on_device import on_device
from data.stochastic_depth import StochasticDepth
from models.operations import Operations
from models.vit import KeptSamples, Tokens
from pretrain.objectives.interface import Moment
from pretrain.objectives.position_scales import drawn_scales
from pretrain.objectives.stochastic_depth import kept_samples
from pretrain.objectives.tile_batch import TileBatch


def require_two_views(global_count: int, local_count: int) -> None:
    """Raise ValueError where there are not two views of a tile to compare."""
    if global_count + local_count < 2:
        raise ValueError(
            "views of a tile are compared, and there is one: set data.crops.global_count=2, or local_count higher"
        )


def depth_of(encoder: Any, group: int) -> StochasticDepth | None:
    """Of an encoder's blocks, in training; else no crop skips any. ``group``: tiles that are drawn from."""
    if not (encoder.drop_path and encoder.training):
        return None
    return StochasticDepth(group, encoder.drop_rates)


def tokens_of_views(
    encoder: Any,
    group: int,
    batch: TileBatch,
    moment: Moment,
    masks: Sequence[Tensor | None] | None = None,
    wanted: Sequence[Tensor | None] | None = None,
) -> list[Tokens]:
    """The tokens of all crops, per crop size; ``masks`` and ``wanted`` as the encoder takes them."""
    sizes = [crops.shape[-1] for crops, _ in batch.crops]
    kept = kept_of_views(encoder, group, batch, moment)
    crops = [crops for crops, _ in batch.crops]
    return encoder(crops, masks, kept, wanted=wanted, **drawn_scales(encoder, sizes, moment))  # type: ignore[no-any-return]


def kept_of_views(
    encoder: Any, group: int, batch: TileBatch, moment: Moment
) -> list[tuple[KeptSamples, KeptSamples] | None] | None:
    """What an encoder's branches run on, by block; None: on all crops. Drawn here where the loader hasn't."""
    depth, (images, views) = depth_of(encoder, group), batch.crops[0]
    if depth is None:
        return None
    tiles, counts = len(images) // views, [views for _, views in batch.crops]
    if batch.kept is None:
        drawn = depth.draw(counts, tiles, seed=moment.seed, step=moment.step, first=moment.first)
        kept = [on_device(crops, images.device) for crops in drawn]
    else:  # drawn for all crop sizes, those of other networks' views last
        kept = list(batch.kept[: len(counts)])
    tokens = [encoder.tokens_per_crop(crops.shape[-1]) for crops, _ in batch.crops]
    return kept_samples(depth, kept, list(zip(counts, tokens, strict=True)), tiles)


def operations_of_views(encoder: Any, group: int, batch: TileBatch, wanted: Sequence[int] | None) -> Operations:
    """Of the pass; ``wanted``: tokens per crop size that the loss is given, None: all."""
    shapes = shapes_of_views(encoder, batch)
    depth = depth_of(encoder, group)
    kept = depth and [
        [
            (of_group * crops // (views * depth.group), tokens)
            for of_group, (crops, tokens), (_, views) in zip(of_block, shapes, batch.crops, strict=True)
        ]
        for of_block in zip(*(depth.kept_of(views * depth.group) for _, views in batch.crops), strict=True)
    ]
    found: Operations = encoder.operations(shapes, kept, wanted)
    return found


def shapes_of_views(encoder: Any, batch: TileBatch) -> list[tuple[int, int]]:
    """Per crop size ``(crops, tokens of each)``."""
    return [(len(images), encoder.tokens_per_crop(images.shape[-1])) for images, _ in batch.crops]


def by_view(rows: Tensor, batch: TileBatch) -> list[Tensor]:
    """Rows of all crops ``(crops, K)`` → per crop size ``(views, tiles, K)``."""
    parts = rows.split([len(crops) for crops, _ in batch.crops])
    return [part.unflatten(0, (views, -1)) for part, (_, views) in zip(parts, batch.crops, strict=True)]
