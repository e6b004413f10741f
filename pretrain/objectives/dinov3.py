"""DINOv3 (Siméoni et al. 2025): DINOv2's terms with separate heads and Sinkhorn-Knopp, and Gram anchoring.

    EMA teacher ──────────── global crops ──▶ targets, as in DINOv2
    student ──────────────── all crops ────▶ class tokens, masked patches, and all patches of global crops
                                                                             │ their matrices of cosines
    Gram teacher, an EMA ─── global crops, larger, in their own colours ─────┘
    teacher of some steps ago

Prototypes are rows of a plain map, which the reference doesn't norm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor, nn

from data.fault import Fault
from data.tiles.crops import FurtherViews
from models.allowed import PIXEL_COUNT, idle_where, one_of, within
from models.operations import Operations, total_operations
from models.vit import VisionTransformer
from pretrain.objectives import teacher as ema
from pretrain.objectives.dense_figures import dense_figures
from pretrain.objectives.dinov2 import DINOv2
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.gram import GRAM_NEGATIVES, gram_distance, on_grid
from pretrain.objectives.self_distillation import SharpeningOfSeparateLevels
from pretrain.objectives.tile_batch import TileBatch

GLOBAL_VIEWS = 2  # of a tile, as in every run of the reference
WITHOUT_GRAM = idle_where("gram_weight", 0)


class DINOv3(DINOv2):
    """The objective. Keyword arguments are its settings (``configs/objective/dinov3.yaml`` explains each).

    ``make_encoder`` builds the tile encoder; it is called for the student, the teacher, and where ``gram_weight`` isn't 0
    for the Gram teacher. Raises Fault for a ``gram_weight`` without larger crops.
    """

    normed_prototypes = False

    def __init__(
        self,
        make_encoder: Callable[[], VisionTransformer],
        *,
        group_size: Annotated[int, within(least=2)],
        local_weight: Annotated[float, within(least=0)],
        gram_weight: Annotated[float, within(least=0)],
        gram_size: Annotated[int | None, PIXEL_COUNT, WITHOUT_GRAM],
        gram_every: Annotated[int, within(least=1), WITHOUT_GRAM, idle_where("gram_refreshes", 0)],
        gram_refreshes: Annotated[int, within(least=0), WITHOUT_GRAM],
        gram_negatives: Annotated[str, one_of(*GRAM_NEGATIVES), WITHOUT_GRAM],
        **settings: Unpack[SharpeningOfSeparateLevels],
    ) -> None:
        super().__init__(
            make_encoder,
            group_size=group_size,
            separate_ibot_head=True,
            frozen_prototype_norms=False,
            centring="sinkhorn",
            **settings,
        )
        self.local_weight, self.gram_weight = local_weight, gram_weight
        self.gram_every, self.gram_refreshes, self.gram_negatives = gram_every, gram_refreshes, gram_negatives
        self.gram_teacher: VisionTransformer | None = None
        if self.further_views({"gram_weight": gram_weight, "gram_size": gram_size}):
            self.gram_teacher = make_encoder().requires_grad_(False)
        self.all_patches = self.gram_teacher is not None

    @classmethod
    def further_views(cls, settings: Mapping[str, Any]) -> Sequence[FurtherViews]:
        if not settings["gram_weight"]:
            return ()
        if settings["gram_size"] is None:
            raise Fault(
                f"objective.gram_weight={settings['gram_weight']:g} compares with an earlier teacher that sees larger"
                " crops: set objective.gram_size to more pixels than data.crops.global_size, or gram_weight=0."
            )
        return [FurtherViews(GLOBAL_VIEWS, settings["gram_size"], (1.0, 1.0), of_global=True)]

    def frozen(self) -> dict[str, nn.Module]:
        more = {} if self.gram_teacher is None else {"teacher of before": self.gram_teacher}
        return super().frozen() | more

    def start(self) -> None:
        super().start()
        if self.gram_teacher is not None:
            ema.copy(self.student.encoder, self.gram_teacher)

    def is_refreshed_at(self, step: int) -> bool:
        """Whether the Gram teacher becomes the EMA teacher before this step; a function of the step alone, so a resumed
        run has the same."""
        return step > 0 and step % self.gram_every == 0 and step // self.gram_every <= self.gram_refreshes

    def prepare(self, parts: Sequence[TileBatch], moment: Moment) -> list[TileBatch]:
        if self.gram_teacher is not None and self.training and self.is_refreshed_at(moment.step):
            ema.copy(self.teacher.encoder, self.gram_teacher)
        return super().prepare(parts, moment)

    def seen_by_student(self, batch: TileBatch) -> TileBatch:
        """A micro-batch without the Gram teacher's crops."""
        return batch if self.gram_teacher is None else replace(batch, crops=batch.crops[:-1])

    def class_token_loss(self, dino_global: Tensor, dino_local: Tensor) -> Tensor:
        return dino_global + self.local_weight * dino_local

    def loss(self, batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch of augmented crops and masks, the Gram teacher's crops last; see `TileBatch`."""
        if batch.targets is None:
            (batch,) = self.prepare([batch], moment)
        seen = self.seen_by_student(batch)
        tokens = self.student_tokens(seen, moment, masked=True)
        loss, figures = self.loss_of(tokens, seen, moment)
        if self.gram_teacher is None:
            return loss, figures
        with torch.no_grad():
            (before,) = self.gram_teacher([batch.crops[-1][0]])
        theirs = on_grid(before.patches, batch.masks.shape[-1])
        gram = gram_distance(tokens[0].patches, theirs, self.gram_negatives)
        return loss + self.gram_weight * gram, figures | {"gram": gram}

    @torch.no_grad()
    def look(self, parts: Sequence[TileBatch], moment: Moment) -> dict[str, float]:
        """Beside how prototypes are used, whether patches still tell places apart; see `dense_figures`."""
        return super().look(parts, moment) | dense_figures(self.teacher.encoder, parts)

    def operations(self, parts: Sequence[TileBatch]) -> Operations:
        seen = DINOv2.operations(self, [self.seen_by_student(part) for part in parts])
        return seen + total_operations(self._gram_operations(part) for part in parts if self.gram_teacher is not None)

    def _gram_operations(self, batch: TileBatch) -> Operations:
        """Of the Gram teacher's pass, and of both matrices of cosines."""
        assert self.gram_teacher is not None
        images, crops = batch.crops[-1][0], len(batch.crops[0][0])
        tokens = self.gram_teacher.tokens_per_crop(images.shape[-1])
        one = 2.0 * crops * batch.masks[0].numel() ** 2 * self.gram_teacher.width
        products = Operations(2 * one, 2 * one)
        return self.gram_teacher.operations([(len(images), tokens)]).without_gradients + products
