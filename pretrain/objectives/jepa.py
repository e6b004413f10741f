"""Patch targets as regression (I-JEPA, Assran et al. 2023) beside DINO on class tokens, as nanopath's recipe has them.

teacher  ←EMA─  student
   │               │
global crops    global crops, all with masked blocks, and local crops
   │               │
cls, patches    cls ──head──▶ prototype scores: cross-entropy over crossed views, and a spread
   │            patches ──predictor──▶ the teacher's tokens at masked places
   └─ normed ──────┴─ smooth L1

The predictor has no teacher: the moving average is of encoder and head alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Unpack

import torch
from torch import Tensor, nn

from models.allowed import Agreements, within
from models.heads import PrototypeHead
from models.operations import Operations, total_operations
from models.patch_predictor import PatchPredictor
from models.vit import VisionTransformer
from pretrain.objectives.dense_figures import dense_figures
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.patch_regression import normed_tokens, patch_regression
from pretrain.objectives.self_distillation import ClassLevel, Network, Taught, Teaching, teaching_of
from pretrain.objectives.spreading import Spread
from pretrain.objectives.tile_batch import TileBatch
from pretrain.objectives.tile_distillation import TileDistillation


class ClassTeaching(ClassLevel, Teaching):
    """Settings of what is learned from class tokens."""


def check_predictor(predictor_width: int | None, predictor_heads: int) -> None:
    """Raise ValueError for a width that the heads don't divide; None is the encoder's, which is seen as it is built."""
    if predictor_width is not None and predictor_width % predictor_heads:
        raise ValueError(
            f"the predictor's width, {predictor_width}, is not divisible by predictor_heads={predictor_heads}"
        )


def check_predictor_in(width: int, predictor_width: int | None, predictor_heads: int) -> None:
    """`check_predictor` beside an encoder of a ``width``."""
    check_predictor(predictor_width or width, predictor_heads)


class JEPA(TileDistillation):
    """The objective. Keyword arguments are its settings (``configs/objective/jepa.yaml`` explains each).

    ``make_encoder`` builds the tile encoder; it is called twice, for student and teacher. ``predictor_width`` None: as
    wide as the encoder. Raises ValueError for an encoder without a mask token, and for a width that the heads don't
    divide.
    """

    masks = True
    all_patches = True
    reading = (
        f"{TileDistillation.reading} The patch term compares with normed tokens, of which a guess of 0 is .42 away where"
        " they are spread as a normal: watch for it falling to nothing, and patch_cosine rising to 1, which is all"
        " patches becoming one."
    )
    agreements: ClassVar[Agreements] = {("predictor_width", "predictor_heads"): check_predictor}

    def __init__(
        self,
        make_encoder: Callable[[], VisionTransformer],
        *,
        group_size: Annotated[int, within(least=2)],
        frozen_prototype_norms: bool,
        patch_weight: Annotated[float, within(least=0)],
        predictor_width: Annotated[int | None, within(least=1)],
        predictor_depth: Annotated[int, within(least=1)],
        predictor_heads: Annotated[int, within(least=1)],
        **settings: Unpack[ClassTeaching],
    ) -> None:
        def network() -> Network:
            encoder = make_encoder()
            if getattr(encoder, "mask_token", None) is None:
                raise ValueError(
                    f"masked patches are replaced by a token, and {type(encoder).__name__} has none: give it a parameter"
                    " mask_token, or take a model that has one (model=vit_small)"
                )
            head = PrototypeHead(
                encoder.width,
                prototypes=settings["prototypes"],
                bottleneck=settings["bottleneck"],
                hidden=settings["hidden"],
                layers=settings["head_layers"],
                frozen_norms=frozen_prototype_norms,
            )
            return Network(encoder, head)

        super().__init__(network, {"dino": settings["prototypes"]}, group_size=group_size, **teaching_of(settings))
        width = self.student.encoder.width
        check_predictor(predictor_width or width, predictor_heads)
        self.predictor = PatchPredictor(
            encoder_width=width, width=predictor_width or width, depth=predictor_depth, heads=predictor_heads
        )
        self.dino_weight, self.patch_weight = settings["dino_weight"], patch_weight
        self.spread = Spread(settings, group_size)

    def trained(self) -> dict[str, nn.Module]:
        return super().trained() | {"predictor": self.predictor}

    def teacher_tokens(self, batch: TileBatch) -> dict[str, Taught]:
        return {"dino": Taught(self.teacher.encoder([batch.crops[0][0]], wanted=[None])[0].cls)}

    def teacher_scores(self, kind: str, tokens: Tensor) -> Tensor:
        return self.teacher.dino_head(tokens)

    @torch.no_grad()
    def prepare(self, parts: Sequence[TileBatch], moment: Moment) -> list[TileBatch]:
        """The micro-batches with their targets: of class tokens, and the teacher's masked patches, normed."""
        seen = [self.teacher.encoder([part.crops[0][0]], wanted=[part.masked])[0] for part in parts]
        of_classes = self.targets_from([{"dino": Taught(tokens.cls)} for tokens in seen], moment)
        return [
            replace(part, targets=targets | {"patches": partial(normed_tokens, tokens.patches)})
            for part, tokens, targets in zip(parts, seen, of_classes, strict=True)
        ]

    def loss(self, batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch of augmented crops and masks; see `TileBatch`."""
        if batch.targets is None:
            (batch,) = self.prepare([batch], moment)
        assert batch.targets is not None
        global_views = batch.crops[0][1]
        tokens = self.student_tokens(batch, moment, masked=True)
        dino_global, dino_local = self.class_entropies(tokens, batch)
        predicted = self.predictor(tokens[0].patches, batch.masked)
        patches = patch_regression(predicted, batch.targets["patches"](), batch.crop_shares, len(batch.masks))
        spread = self.spread(tokens[0].cls, moment)
        total = (
            self.dino_weight * (dino_global + dino_local)
            + self.patch_weight * patches
            + self.spread.weight(moment) * global_views * spread
        )
        return total, {
            "dino_global": dino_global,
            "dino_local": dino_local,
            "patches": patches,
            "spread": spread,
            **self.schedules(moment),
        }

    @torch.no_grad()
    def look(self, parts: Sequence[TileBatch], moment: Moment) -> dict[str, float]:
        """Beside how prototypes are used, whether patches still tell places apart; see `dense_figures`."""
        return super().look(parts, moment) | dense_figures(self.teacher.encoder, parts)

    def operations(self, parts: Sequence[TileBatch]) -> Operations:
        return total_operations(self._operations(part, len(part.masked), len(parts)) for part in parts)

    def _operations(self, batch: TileBatch, masked: int, parts: int) -> Operations:
        tiles, crops = sum(len(images) for images, _ in batch.crops), len(batch.crops[0][0])
        return (
            self.encoder_operations(batch, masked)
            + self.head_operations("dino_head", tiles, crops, parts)
            + self.predictor.operations(crops, batch.masks[0].numel(), masked)
        )
