"""Distillation: a student learns the features of a frozen teacher, which may be another network altogether.

    given teacher ── global crops, resized to the student's grid of patches ──▶ class tokens, patch tokens
    student ──────── all crops ──▶ class tokens, patches ──linear maps──▶ the same width ─┘ distances
        └─EMA─▶ teacher, which is what is looked at, embedded and exported

A global crop's class token and patches predict the given teacher's of the same crop; a local crop's class token predicts
those of all global crops. Nothing is masked, as in DINOv2's and DINOv3's distillation. DINOv3's own form, where the student
predicts the prototypes of the teacher's heads, is `DistilHeads`: published weights come without heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from data.fault import Fault
from data.stochastic_depth import StochasticDepth
from models.allowed import ON_DISK, SHARE, Agreements, one_of, within
from models.attention import check_heads
from models.formats.published import PublishedWeights, require_finite
from models.heads import Projector
from models.operations import Operations, total_operations
from models.rotary import check_turns
from models.vit import VisionTransformer
from pretrain.encoders.init import find_encoder
from pretrain.objectives import teacher as ema
from pretrain.objectives.given_teacher import TaughtByGiven, given_side, shown_to_given
from pretrain.objectives.interface import BACKBONE, Moment
from pretrain.objectives.losses.regression import DISTANCES
from pretrain.objectives.packed_views import by_view, depth_of, operations_of_views, shapes_of_views, tokens_of_views
from pretrain.objectives.schedules import cosine
from pretrain.objectives.tile_batch import TileBatch


def check_taught(class_weight: float, patch_weight: float) -> None:
    """Raise ValueError where no distance weighs anything."""
    if not class_weight and not patch_weight:
        raise ValueError("nothing is learned: give one of them")


class Distil(TaughtByGiven):
    """The objective. Keyword arguments are its settings (``configs/objective/distil.yaml`` explains each).

    Raises Fault where ``teacher`` names no vision transformer, or doesn't show what its weights belong to.
    """

    learns = "from another encoder, on tiles without labels"
    reading = (
        "Its terms are distances to the given teacher's features: of cosines 1 is chance and 0 the teacher itself, of"
        " smooth_l1 about .4 is chance. A wide teacher's features can't all be had by a narrow student."
    )

    agreements: ClassVar[Agreements] = {("class_weight", "patch_weight"): check_taught}

    def __init__(
        self,
        make_encoder: Callable[[], VisionTransformer],
        *,
        teacher: Annotated[str | None, ON_DISK],
        teacher_heads: Annotated[int | None, within(least=1)],
        teacher_epsilon: Annotated[float | None, within(above=0)],
        group_size: Annotated[int, within(least=1)],
        distance: Annotated[str, one_of(*DISTANCES)],
        class_weight: Annotated[float, within(least=0)],
        local_weight: Annotated[float, within(least=0)],
        patch_weight: Annotated[float, within(least=0)],
        teacher_momentum: Annotated[float, SHARE],
        teacher_momentum_final: Annotated[float, SHARE],
    ) -> None:
        super().__init__()
        check_taught(class_weight, patch_weight)
        self.asked = (teacher, teacher_heads, teacher_epsilon)
        self.learn_from(VisionTransformer(**given_settings(*self.asked)), str(teacher))
        self.encoder = make_encoder()
        self.encoder.mask_token.requires_grad_(False)  # nothing is masked
        self.teacher = nn.ModuleDict({BACKBONE: make_encoder().requires_grad_(False)})
        self.class_projector = linear(self.encoder.width, self.given.width) if class_weight else None
        self.patch_projector = linear(self.encoder.width, self.given.width) if patch_weight else None
        self.group_size, self.distance = group_size, DISTANCES[distance]
        self.class_weight, self.local_weight, self.patch_weight = class_weight, local_weight, patch_weight
        self.momenta = (teacher_momentum, teacher_momentum_final)

    def trained(self) -> dict[str, nn.Module]:
        heads = {"class_projector": self.class_projector, "patch_projector": self.patch_projector}
        return {BACKBONE: self.encoder} | {name: head for name, head in heads.items() if head is not None}

    def frozen(self) -> dict[str, nn.Module]:
        return {f"teacher.{BACKBONE}": self.teacher[BACKBONE], "teacher that is given": self.given}

    def stochastic_depth(self) -> StochasticDepth | None:
        return depth_of(self.encoder, self.group_size)

    def start(self) -> None:
        ema.copy(self.encoder, self.teacher[BACKBONE])
        self.fill_given(given_weights(*self.asked).weights)

    @torch.no_grad()
    def taught(self, batch: TileBatch) -> tuple[Tensor, Tensor]:
        """The given teacher's class tokens ``(views, tiles, width)`` and patches ``(views · tiles, patches, width)`` of
        the global crops."""
        (tokens,) = self.given([shown_to_given(self.given, batch)])
        return tokens.cls.unflatten(0, (batch.crops[0][1], -1)), tokens.patches

    def loss(self, batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch of augmented crops; its masks play no part."""
        classes, patches = self.taught(batch)
        tokens = tokens_of_views(self.encoder, self.group_size, batch, moment)
        figures: dict[str, Tensor] = {}
        loss = patches.new_zeros(())
        if self.class_projector is not None:
            projected = by_view(self.class_projector(torch.cat([part.cls for part in tokens])), batch)
            figures["class_global"] = self.distance(projected[0], classes)
            loss = loss + self.class_weight * figures["class_global"]
            if projected[1:]:
                every = torch.cat(projected[1:]).unsqueeze(1).expand(-1, len(classes), -1, -1)
                figures["class_local"] = self.distance(every, classes.unsqueeze(0))
                loss = loss + self.class_weight * self.local_weight * figures["class_local"]
        if self.patch_projector is not None:
            figures["patches"] = self.distance(self.patch_projector(tokens[0].patches), patches)
            loss = loss + self.patch_weight * figures["patches"]
        return loss, figures | {"momentum": torch.tensor(self.teacher_momentum(moment))}

    def teacher_momentum(self, moment: Moment) -> float:
        """A half cosine over the whole run."""
        first, last = self.momenta
        return cosine(moment.step, peak=first, final=last, total=moment.steps)

    def after_step(self, moment: Moment) -> None:
        ema.ema_update(self.encoder, self.teacher[BACKBONE], self.teacher_momentum(moment))

    def operations(self, parts: Sequence[TileBatch]) -> Operations:
        return total_operations(self._operations(part) for part in parts)

    def _operations(self, batch: TileBatch) -> Operations:
        shapes = shapes_of_views(self.encoder, batch)
        crops, patches = sum(count for count, _ in shapes), batch.masks.numel()
        given = [(shapes[0][0], self.given.tokens_per_crop(given_side(self.given, batch)))]
        found = operations_of_views(self.encoder, self.group_size, batch, None)
        found += self.given.operations(given).without_gradients
        for head, rows in ((self.class_projector, crops), (self.patch_projector, patches)):
            found += Operations() if head is None else head.operations(rows)
        return found


def linear(inputs: int, outputs: int) -> Projector:
    """A learned map to another width."""
    return Projector(inputs, hidden=outputs, layers=1, outputs=outputs)


def given_weights(source: str | None, heads: int | None, epsilon: float | None) -> PublishedWeights:
    """The teacher that ``objective.teacher`` names, on the CPU; ``heads`` and ``epsilon``: what its file doesn't say."""
    if source is None:
        raise Fault(
            "objective.teacher= names nothing: give the encoder to be learned from, in any form that init= takes (a run,"
            " an exported folder, a timm name, a checkpoint file)."
        )
    try:
        with torch.device("cpu"):
            found = find_encoder(source)
        require_finite(found.weights)
    except Fault as fault:
        raise Fault(str(fault).replace(f"init={source}", f"objective.teacher={source}")) from fault
    except ValueError as error:
        raise Fault(f"objective.teacher={source} is not usable: {error}") from error
    return replace(
        found,
        heads=found.heads if heads is None else heads,
        norm_epsilon=found.norm_epsilon if epsilon is None else epsilon,
    )


@lru_cache
def given_settings(source: str | None, heads: int | None, epsilon: float | None) -> dict[str, Any]:
    """The settings of its network; a run asks some times over, and files are large. Raises Fault where they don't
    show, and for heads that its width can't be shared by."""
    try:
        found = given_weights(source, heads, epsilon).settings()
    except ValueError as error:
        raise Fault(
            f"objective.teacher={source}: {error}: give objective.teacher_heads=, objective.teacher_epsilon= or both."
        ) from error
    try:
        check_heads(found["width"], found["heads"])
        check_turns(found["position_embedding"], found["width"], found["heads"])
    except ValueError as error:
        raise Fault(
            f"objective.teacher={source}: {error}: give its own number of heads, objective.teacher_heads=."
        ) from error
    return found
