"""Self-distillation on tiles: what the teacher and the student see of a batch of crops, and which samples skip which
branch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Unpack

from torch import Tensor

from data.fault import Fault
from data.on_device import on_device
from data.stochastic_depth import StochasticDepth
from models.operations import Operations
from models.vit import KeptSamples, Tokens
from pretrain.objectives.interface import Moment
from pretrain.objectives.position_scales import drawn_scales
from pretrain.objectives.self_distillation import Network, SelfDistillation, Teaching
from pretrain.objectives.stochastic_depth import kept_samples
from pretrain.objectives.tile_batch import TileBatch


class TileDistillation(SelfDistillation):
    """`SelfDistillation` whose batches are `TileBatch`. ``group_size``: tiles that stochastic depth draws from."""

    all_patches: bool = False
    """Whether the loss is given the student's patch tokens of all crops, in place of the masked ones alone."""

    def __init__(
        self,
        make_network: Callable[[], Network],
        prototypes: dict[str, int],
        *,
        group_size: int,
        **teaching: Unpack[Teaching],
    ) -> None:
        super().__init__(make_network, prototypes, **teaching)
        self.group_size = group_size

    def stochastic_depth(self) -> StochasticDepth | None:
        """Of the student's blocks, in training; else no crop skips any."""
        encoder = self.student.encoder
        if not (encoder.drop_path and encoder.training):
            return None
        return StochasticDepth(self.group_size, encoder.drop_rates)

    def prepare(self, parts: Sequence[TileBatch], moment: Moment) -> list[TileBatch]:
        """The micro-batches with their targets."""
        return [
            replace(part, targets=targets) for part, targets in zip(parts, self.targets_of(parts, moment), strict=True)
        ]

    def student_tokens(self, batch: TileBatch, moment: Moment, masked: bool = False) -> list[Tokens]:
        """The student's tokens of all crops in one packed pass, with stochastic depth: class tokens and masked patches.

        Where ``masked``, patches are replaced by the mask token as the batch says, and are the patches that come back;
        where `all_patches` is set, those of all crops do, ``(crops, patches, width)``.

        Raises Fault where there are not two views to compare.
        """
        if sum(views for _, views in batch.crops) < 2:
            raise Fault(
                "self-distillation compares views of a tile, and there is one: set data.crops.global_count=2, or"
                " local_count higher."
            )
        encoder = self.student.encoder
        scales = drawn_scales(encoder, [crops.shape[-1] for crops, _ in batch.crops], moment)
        others = [None] * (len(batch.crops) - 1)
        masks = [batch.masks.flatten(1) if masked else None, *others]
        wanted = None if self.all_patches else [batch.masked if masked else None, *others]
        crops, kept = [crops for crops, _ in batch.crops], self._kept(batch, moment)
        return encoder(crops, masks, kept, wanted=wanted, **scales)

    def _kept(self, batch: TileBatch, moment: Moment) -> list[tuple[KeptSamples, KeptSamples] | None] | None:
        """What the student's branches run on, by block; None: on all crops. Drawn here where the loader hasn't."""
        depth, (images, views) = self.stochastic_depth(), batch.crops[0]
        if depth is None:
            return None
        tiles, counts = len(images) // views, [views for _, views in batch.crops]
        if batch.kept is None:
            drawn = depth.draw(counts, tiles, seed=moment.seed, step=moment.step, first=moment.first)
            kept = [on_device(crops, images.device) for crops in drawn]
        else:  # drawn for all crop sizes, those of other networks' views last
            kept = list(batch.kept[: len(counts)])
        tokens = [self.student.encoder.tokens_per_crop(crops.shape[-1]) for crops, _ in batch.crops]
        return kept_samples(depth, kept, list(zip(counts, tokens, strict=True)), tiles)

    def encoder_operations(self, batch: TileBatch, masked: int) -> Operations:
        """Of both encoders on a micro-batch whose loss is given ``masked`` patches."""
        encoder = self.student.encoder
        shapes = [(len(images), encoder.tokens_per_crop(images.shape[-1])) for images, _ in batch.crops]
        wanted = [crops + (0 if i else masked) for i, (crops, _) in enumerate(shapes)]
        depth = self.stochastic_depth()
        kept = depth and [
            [
                (of_group * crops // (views * depth.group), tokens)
                for of_group, (crops, tokens), (_, views) in zip(of_block, shapes, batch.crops, strict=True)
            ]
            for of_block in zip(*(depth.kept_of(views * depth.group) for _, views in batch.crops), strict=True)
        ]
        student = encoder.operations(shapes, kept, None if self.all_patches else wanted)
        return student + self.teacher.encoder.operations(shapes[:1], wanted=wanted[:1]).without_gradients


def by_view(scores: Tensor, batch: TileBatch) -> list[Tensor]:
    """Class-token scores ``(all crops, K)`` → per crop size ``(views, tiles, K)``."""
    parts = scores.split([len(crops) for crops, _ in batch.crops])
    return [part.unflatten(0, (views, -1)) for part, (_, views) in zip(parts, batch.crops, strict=True)]
