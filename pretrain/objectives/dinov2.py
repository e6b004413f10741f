"""DINOv2 (Oquab et al. 2023): image-level DINO, patch-level iBOT, and a spread regulariser.

teacher  ←EMA─  student
   │               │
global crops    global crops, half of them with masked patches, and local crops
   │               │
cls, patches    cls, masked patches  ──heads──▶ prototype scores
   └─ centring ────┴─ cross-entropies
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Unpack

from models.allowed import within
from models.vit import VisionTransformer
from pretrain.objectives.self_distillation import (
    TeachingOfLevels,
    prototypes_of_levels,
    teaching_of,
    two_level_network,
)
from pretrain.objectives.two_levels import TwoLevels


class DINOv2(TwoLevels):
    """The full objective. Keyword arguments are its settings (``configs/objective/dinov2.yaml`` explains each).

    ``make_encoder`` builds the tile encoder; it is called twice, for student and teacher.
    """

    normed_prototypes: ClassVar[bool] = True

    def __init__(
        self,
        make_encoder: Callable[[], VisionTransformer],
        *,
        group_size: Annotated[int, within(least=2)],
        **settings: Unpack[TeachingOfLevels],
    ) -> None:
        super().__init__(
            lambda: two_level_network(make_encoder(), settings, self.normed_prototypes),
            prototypes_of_levels(settings),
            group_size=group_size,
            weights=settings,
            **teaching_of(settings),
        )

    operations = TwoLevels.operations
