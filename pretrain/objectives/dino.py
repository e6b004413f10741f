"""DINO (Caron et al. 2021): a student's class tokens predict the teacher's, across views. No masks, no regulariser.

Set against the public code (facebookresearch/dino): its stochastic depth rises linearly over the blocks and scales
single samples, here all blocks share one rate and samples are skipped, as in DINOv2; it clips each tensor's gradient by
itself (``optim.clip_each``); gradients are otherwise those of its loss.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Unpack

from torch import Tensor

from models.allowed import PROTOTYPES, within
from models.heads import PrototypeHead
from models.operations import Operations, total_operations
from models.vit import VisionTransformer
from pretrain.objectives.interface import Moment
from pretrain.objectives.self_distillation import Network, Taught, Teaching
from pretrain.objectives.tile_batch import TileBatch
from pretrain.objectives.tile_distillation import TileDistillation


class DINO(TileDistillation):
    """The objective. Keyword arguments are its settings (``configs/objective/dino.yaml`` explains each).

    ``make_encoder`` builds the tile encoder; it is called twice, for student and teacher.
    """

    def __init__(
        self,
        make_encoder: Callable[[], VisionTransformer],
        *,
        group_size: Annotated[int, within(least=1)],
        prototypes: Annotated[int, PROTOTYPES],
        bottleneck: Annotated[int, within(least=1)],
        hidden: Annotated[int, within(least=1)],
        head_layers: Annotated[int, within(least=1)],
        frozen_prototype_norms: bool,
        **teaching: Unpack[Teaching],
    ) -> None:
        def network() -> Network:
            encoder = make_encoder()
            encoder.mask_token.requires_grad_(False)  # nothing is masked
            head = PrototypeHead(
                encoder.width,
                prototypes=prototypes,
                bottleneck=bottleneck,
                hidden=hidden,
                layers=head_layers,
                frozen_norms=frozen_prototype_norms,
            )
            return Network(encoder, head)

        super().__init__(
            network,
            {"dino": prototypes},
            group_size=group_size,
            **teaching,
        )

    def teacher_tokens(self, batch: TileBatch) -> dict[str, Taught]:
        return {"dino": Taught(self.teacher.encoder([batch.crops[0][0]], wanted=[None])[0].cls)}

    def teacher_scores(self, kind: str, tokens: Tensor) -> Tensor:
        return self.teacher.dino_head(tokens)

    def loss(self, batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch of augmented crops; its masks play no part."""
        if batch.targets is None:
            (batch,) = self.prepare([batch], moment)
        dino_global, dino_local = self.class_entropies(self.student_tokens(batch, moment), batch)
        return dino_global + dino_local, {
            "dino_global": dino_global,
            "dino_local": dino_local,
            **self.schedules(moment),
        }

    def operations(self, parts: Sequence[TileBatch]) -> Operations:
        return total_operations(
            self.encoder_operations(part, masked=0)
            + self.head_operations(
                "dino_head", sum(len(images) for images, _ in part.crops), len(part.crops[0][0]), len(parts)
            )
            for part in parts
        )
