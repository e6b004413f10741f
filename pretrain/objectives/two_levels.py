"""What is learned on two levels from a teacher with heads: class tokens of a view predict those of the others, patches
the teacher's at the same place, and class tokens are kept apart."""

from collections.abc import Callable, Sequence
from typing import Unpack

from torch import Tensor

from models.operations import Operations, total_operations
from models.vit import Tokens
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.cross_entropy import masked_cross_entropy
from pretrain.objectives.self_distillation import LevelWeights, Network, Taught, Teaching
from pretrain.objectives.spreading import Spread
from pretrain.objectives.tile_batch import TileBatch
from pretrain.objectives.tile_distillation import TileDistillation


class TwoLevels(TileDistillation):
    """`TileDistillation` with the terms of DINO, iBOT and a spread, as ``weights`` weigh them. Networks are the
    subclass's."""

    masks = True
    reading = f"{TileDistillation.reading.removesuffix('.')} and for KoLeo rising (features falling together)."

    def __init__(
        self,
        make_network: Callable[[], Network],
        prototypes: dict[str, int],
        *,
        group_size: int,
        weights: LevelWeights,
        **teaching: Unpack[Teaching],
    ) -> None:
        super().__init__(make_network, prototypes, group_size=group_size, **teaching)
        self.dino_weight, self.ibot_weight = weights["dino_weight"], weights["ibot_weight"]
        self.spread = Spread(weights, group_size)

    def teacher_tokens(self, batch: TileBatch) -> dict[str, Taught]:
        (seen,) = self.teacher.encoder([batch.crops[0][0]], wanted=[batch.masked])
        return {"dino": Taught(seen.cls), "ibot": Taught(seen.patches)}

    def teacher_scores(self, kind: str, tokens: Tensor) -> Tensor:
        source = self.source_of_targets
        return source.dino_head(tokens) if kind == "dino" else source.score_patches(tokens)

    def loss(self, batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch of augmented crops and masks; see `TileBatch`."""
        if batch.targets is None:
            (batch,) = self.prepare([batch], moment)
        return self.loss_of(self.student_tokens(batch, moment, masked=True), batch, moment)

    def loss_of(self, tokens: list[Tokens], batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch whose student's tokens are there, and its figures; a subclass adds terms of the
        same tokens to it."""
        assert batch.targets is not None
        global_views = batch.crops[0][1]
        dino_global, dino_local = self.class_entropies(tokens, batch)
        patches = tokens[0].patches
        if self.all_patches:
            patches = patches.flatten(0, 1).index_select(0, batch.masked)
        student_patches = self.student.score_patches(patches)
        ibot = masked_cross_entropy(
            student_patches, batch.targets["ibot"](), batch.crop_shares, len(batch.masks), self.student_temperature
        )
        spread = self.spread(tokens[0].cls, moment)  # mean over views; DINOv2 sums it over them

        total = (
            self.dino_weight * self.class_token_loss(dino_global, dino_local)
            + self.ibot_weight * ibot
            + self.spread.weight(moment) * global_views * spread
        )
        return total, {
            "dino_global": dino_global,
            "dino_local": dino_local,
            "ibot": ibot,
            "spread": spread,
            **self.schedules(moment),
        }

    def class_token_loss(self, dino_global: Tensor, dino_local: Tensor) -> Tensor:
        """Of the shares of global and local views."""
        return dino_global + dino_local

    def operations(self, parts: Sequence[TileBatch]) -> Operations:
        return total_operations(self._operations(part, len(part.masked), len(parts)) for part in parts)

    def _operations(self, batch: TileBatch, masked: int, parts: int) -> Operations:
        tiles, (crops, _) = sum(len(images) for images, _ in batch.crops), batch.crops[0]
        patches = self.head_operations("ibot_head" if self.student.ibot_head else "dino_head", masked, masked, parts)
        return (
            self.encoder_operations(batch, masked)
            + self.head_operations("dino_head", tiles, len(crops), parts)
            + patches
        )
