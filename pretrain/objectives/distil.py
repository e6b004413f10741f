"""Distillation: a student learns the features of a frozen teacher, which may be another network altogether.

    given teacher ── global crops, resized to the student's grid of patches ──▶ class tokens, patch tokens
    student ──────── all crops ──▶ class tokens, patches ──linear maps──▶ the same width ─┘ distances
        └─EMA─▶ teacher, which is what is looked at, embedded and exported

A global crop's class token and patches predict the given teacher's of the same crop; a local crop's class token predicts
those of all global crops. Nothing is masked, as in DINOv2's and DINOv3's distillation.

Grids always match: the given teacher sees a crop at as many pixels as make its patches as many as the student's, resized
bicubically with antialiasing (224 px in patches of 14 for a student with 256 px in patches of 16). Its colours are
normalised as the student's, so ``data.mean`` and ``data.std`` are to be those it was trained with.

The given teacher's weights are no part of a checkpoint. Its place is in the settings, a hash of its weights beside the
networks, and a run goes on with the same ones. DINOv3's own form, where the student predicts the prototypes of the
teacher's heads, is not here: published weights come without heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.fault import Fault
from data.stochastic_depth import StochasticDepth
from models.allowed import ON_DISK, SHARE, one_of, within
from models.formats.published import PublishedWeights, require_finite
from models.heads import Projector
from models.initialise import assign
from models.operations import Operations, total_operations
from models.vit import VisionTransformer
from pretrain.encoders.frozen import fingerprint_of
from pretrain.encoders.init import find_encoder
from pretrain.objectives import teacher as ema
from pretrain.objectives.interface import BACKBONE, Moment, Objective
from pretrain.objectives.losses.regression import DISTANCES
from pretrain.objectives.packed_views import by_view, depth_of, operations_of_views, shapes_of_views, tokens_of_views
from pretrain.objectives.schedules import cosine
from pretrain.objectives.tile_batch import TileBatch

GIVEN = "given"  # the attribute, and so the beginning of its weights' names


class Distil(Objective):
    """The objective. Keyword arguments are its settings (``configs/objective/distil.yaml`` explains each).

    Raises Fault where ``teacher`` names no vision transformer, or doesn't show what its weights belong to.
    """

    learns = "from another encoder, on tiles without labels"
    reading = (
        "Its terms are distances to the given teacher's features: of cosines 1 is chance and 0 the teacher itself, of"
        " smooth_l1 about .4 is chance. A wide teacher's features can't all be had by a narrow student."
    )

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
        if not class_weight and not patch_weight:
            raise ValueError("nothing is learned with class_weight=0 and patch_weight=0: give one of them")
        self.source = (teacher, teacher_heads, teacher_epsilon)
        self.given = VisionTransformer(**given_settings(*self.source)).requires_grad_(False).eval()
        self.digest = ""
        self.encoder = make_encoder()
        self.encoder.mask_token.requires_grad_(False)  # nothing is masked
        self.teacher = nn.ModuleDict({BACKBONE: make_encoder().requires_grad_(False)})
        self.class_projector = linear(self.encoder.width, self.given.width)
        self.patch_projector = linear(self.encoder.width, self.given.width)
        self.group_size, self.distance = group_size, DISTANCES[distance]
        self.class_weight, self.local_weight, self.patch_weight = class_weight, local_weight, patch_weight
        self.momenta = (teacher_momentum, teacher_momentum_final)
        self.register_state_dict_post_hook(leave_out_given)
        self.register_load_state_dict_post_hook(not_missed)

    def trained(self) -> dict[str, nn.Module]:
        heads = {"class_projector": self.class_projector, "patch_projector": self.patch_projector}
        used = {"class_projector": self.class_weight, "patch_projector": self.patch_weight}
        return {BACKBONE: self.encoder} | {name: head for name, head in heads.items() if used[name]}

    def frozen(self) -> dict[str, nn.Module]:
        return {f"teacher.{BACKBONE}": self.teacher[BACKBONE], "teacher that is given": self.given}

    def stochastic_depth(self) -> StochasticDepth | None:
        return depth_of(self.encoder, self.group_size)

    def train(self, mode: bool = True) -> "Distil":
        super().train(mode)
        self.given.eval()
        return self

    @torch.no_grad()
    def start(self) -> None:
        ema.copy(self.encoder, self.teacher[BACKBONE])
        weights = given_weights(*self.source).weights
        self.digest = fingerprint_of(weights)
        for name, target in self.given.state_dict(keep_vars=True).items():
            # A mask token is no part of some formats, and never used here.
            assign(target, weights[name].float() if name in weights else torch.zeros(target.shape))

    def rests_on(self) -> dict[str, str]:
        return {f"objective.teacher={self.source[0]}": self.digest}

    @torch.no_grad()
    def taught(self, batch: TileBatch) -> tuple[Tensor, Tensor]:
        """The given teacher's class tokens ``(views, tiles, width)`` and patches ``(views · tiles, patches, width)`` of
        the global crops."""
        images, views = batch.crops[0]
        side = self.given_side(batch)
        if side != images.shape[-1]:
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)
        (tokens,) = self.given([images])
        return tokens.cls.unflatten(0, (views, -1)), tokens.patches

    def given_side(self, batch: TileBatch) -> int:
        """Pixels a side at which the given teacher has as many patches as the student."""
        return int(batch.masks.shape[-1] * self.given.patch_size)

    def loss(self, batch: TileBatch, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch of augmented crops; its masks play no part."""
        classes, patches = self.taught(batch)
        tokens = tokens_of_views(self.encoder, self.group_size, batch, moment)
        figures: dict[str, Tensor] = {}
        loss = patches.new_zeros(())
        if self.class_weight:
            projected = by_view(self.class_projector(torch.cat([part.cls for part in tokens])), batch)
            figures["class_global"] = self.distance(projected[0], classes)
            loss = loss + self.class_weight * figures["class_global"]
            if projected[1:]:
                every = torch.cat(projected[1:]).unsqueeze(1).expand(-1, len(classes), -1, -1)
                figures["class_local"] = self.distance(every, classes.unsqueeze(0))
                loss = loss + self.class_weight * self.local_weight * figures["class_local"]
        if self.patch_weight:
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
        given = [(shapes[0][0], self.given.tokens_per_crop(self.given_side(batch)))]
        found = operations_of_views(self.encoder, self.group_size, batch, None)
        found += self.given.operations(given).without_gradients
        for weight, head, rows in (
            (self.class_weight, self.class_projector, crops),
            (self.patch_weight, self.patch_projector, patches),
        ):
            found += head.operations(rows) if weight else Operations()
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
    show."""
    try:
        return given_weights(source, heads, epsilon).settings()
    except ValueError as error:
        raise Fault(
            f"objective.teacher={source}: {error}: give objective.teacher_heads=, objective.teacher_epsilon= or both."
        ) from error


def leave_out_given(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Take the given teacher out of a state that is to be saved."""
    for name in [name for name in state if name.startswith(f"{prefix}{GIVEN}.")]:
        del state[name]


def not_missed(_: nn.Module, incompatible: Any) -> None:
    """Let a state be loaded that lacks the given teacher."""
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(f"{GIVEN}.")]
