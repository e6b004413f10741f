"""Self-distillation on tiles: what the teacher and the student see of a batch of crops, and which samples skip which
branch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from data.stochastic_depth import StochasticDepth
from models.operations import Operations
from models.vit import Tokens
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.cross_entropy import cross_view_entropy
from pretrain.objectives.packed_views import (
    by_view,
    depth_of,
    operations_of_views,
    require_two_views,
    shapes_of_views,
    tokens_of_views,
)
from pretrain.objectives.self_distillation import Network, SelfDistillation, Teaching
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

    @classmethod
    def check_views(cls, global_count: int, local_count: int) -> None:
        require_two_views(global_count, local_count)

    def stochastic_depth(self) -> StochasticDepth | None:
        """Of the student's blocks, in training; else no crop skips any."""
        return depth_of(self.student.encoder, self.group_size)

    def prepare(self, parts: Sequence[TileBatch], moment: Moment) -> list[TileBatch]:
        """The micro-batches with their targets."""
        return [
            replace(part, targets=targets) for part, targets in zip(parts, self.targets_of(parts, moment), strict=True)
        ]

    def student_tokens(self, batch: TileBatch, moment: Moment, masked: bool = False) -> list[Tokens]:
        """The student's tokens of all crops in one packed pass, with stochastic depth: class tokens and masked patches.

        Where ``masked``, patches are replaced by the mask token as the batch says, and are the patches that come back;
        where `all_patches` is set, those of all crops do, ``(crops, patches, width)``.
        """
        others = [None] * (len(batch.crops) - 1)
        masks = [batch.masks.flatten(1) if masked else None, *others]
        wanted = None if self.all_patches else [batch.masked if masked else None, *others]
        return tokens_of_views(self.student.encoder, self.group_size, batch, moment, masks, wanted)

    def class_entropies(self, tokens: list[Tokens], batch: TileBatch) -> tuple[Tensor, Tensor]:
        """`cross_view_entropy` of the student's class tokens, its shares of global and of local views."""
        assert batch.targets is not None
        scores = self.student.dino_head(torch.cat([part.cls for part in tokens]))
        targets = batch.targets["dino"]().unflatten(0, (batch.crops[0][1], -1))
        return cross_view_entropy(by_view(scores, batch), targets, self.student_temperature)

    def encoder_operations(self, batch: TileBatch, masked: int) -> Operations:
        """Of both encoders on a micro-batch whose loss is given ``masked`` patches."""
        encoder = self.student.encoder
        shapes = shapes_of_views(encoder, batch)
        wanted = [crops + (0 if i else masked) for i, (crops, _) in enumerate(shapes)]
        student = operations_of_views(encoder, self.group_size, batch, None if self.all_patches else wanted)
        return student + self.teacher_operations(batch, wanted[0])

    def teacher_operations(self, batch: TileBatch, wanted: int) -> Operations:
        """Of the pass that so many tokens of targets come from."""
        encoder = self.teacher.encoder
        return encoder.operations(shapes_of_views(encoder, batch)[:1], wanted=[wanted]).without_gradients
