"""Distillation by a teacher's heads (DINOv3, Siméoni et al. 2025): a student learns which prototypes a frozen teacher
gives tiles and patches to.

    given teacher ── global crops ──its heads──▶ Sinkhorn-Knopp ──▶ targets
    student ──────── all crops, nothing masked ──its heads──▶ scores of the same prototypes ─┘ DINO, iBOT; and a spread
        └─EMA─▶ teacher, which is embedded and exported

The given teacher stands where the moving average does in DINOv2, whose terms these are. It is a run of this project, whose
checkpoints hold its heads. The student's heads are as large as they are, on tokens of its own width, and start anew.

``data.masks`` says which patches are compared: the student sees them, as all others. Comparing all would cost a head's
pass over every patch.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Size, Tensor, nn

from data.fault import Fault
from models.allowed import ON_DISK, within
from models.formats.published import require_finite
from models.heads import PrototypeHead
from models.operations import Operations
from models.vit import Tokens, VisionTransformer
from pretrain.encoders.run_checkpoint import RunCheckpoint, find_checkpoint, require_tile_run, untrained
from pretrain.encoders.weight_files import TRANSFORMERS_CONFIG
from pretrain.objectives.given_teacher import TaughtByGiven, given_side, shown_to_given
from pretrain.objectives.interface import Moment
from pretrain.objectives.packed_views import tokens_of_views
from pretrain.objectives.self_distillation import LevelWeights, Network, Sharpening, Taught, teaching_of
from pretrain.objectives.tile_batch import TileBatch
from pretrain.objectives.two_levels import TwoLevels
from pretrain.run import checkpoints

PREFIX = "teacher."  # of the moving average's weights, in the checkpoints of runs that have one


class SharpenedLevels(LevelWeights, Sharpening):
    """Settings of the terms, and of how targets are sharpened and the moving average follows."""


class DistilHeads(TaughtByGiven, TwoLevels):
    """The objective. Keyword arguments are its settings (``configs/objective/distil_heads.yaml`` explains each).

    Raises Fault where ``teacher`` names no run with heads of class tokens and of patches.
    """

    learns = "from another encoder and its heads, on tiles without labels"
    reading = (
        "Its class-token terms together start near the logarithm of the number of prototypes, and end near the given"
        " teacher's teacher_entropy/dino: targets don't move, so what is above it is what the student hasn't learned."
    )

    def __init__(
        self,
        make_encoder: Callable[[], VisionTransformer],
        *,
        teacher: Annotated[str | None, ON_DISK],
        group_size: Annotated[int, within(least=2)],
        **settings: Unpack[SharpenedLevels],
    ) -> None:
        found, shapes = run_with_heads(teacher)
        given = with_heads(untrained(found), shapes)

        def network() -> Network:
            encoder = make_encoder()
            encoder.mask_token.requires_grad_(False)  # nothing is masked
            return with_heads(encoder, shapes)

        super().__init__(
            network,
            {"dino": given.dino_head.prototypes, "ibot": (given.ibot_head or given.dino_head).prototypes},
            group_size=group_size,
            weights=settings,
            **teaching_of({**settings, "centring": "sinkhorn"}),  # type: ignore[typeddict-unknown-key]
        )
        self.learn_from(given, str(teacher))

    @property
    def source_of_targets(self) -> Network:
        """The given teacher."""
        given: Network = self.given
        return given

    def frozen(self) -> dict[str, nn.Module]:
        given = {f"teacher that is given.{name}": module for name, module in self.given.named_children()}
        return super().frozen() | given

    def start(self) -> None:
        super().start()
        weights = weights_with_heads(self.source)
        if odd := sorted(weights.keys() ^ self.given.state_dict().keys()):
            raise Fault(
                f"objective.teacher={self.source} doesn't fit the model in its config.yaml: one of them lacks"
                f" {', '.join(odd[:5])}."
            )
        self.fill_given(weights)

    def teacher_tokens(self, batch: TileBatch) -> dict[str, Taught]:
        encoder = self.given.encoder
        (seen,) = encoder([shown_to_given(encoder, batch)], wanted=[batch.masked])
        return {"dino": Taught(seen.cls), "ibot": Taught(seen.patches)}

    def teacher_operations(self, batch: TileBatch, wanted: int) -> Operations:
        encoder = self.given.encoder
        shape = (len(batch.crops[0][0]), encoder.tokens_per_crop(given_side(encoder, batch)))
        found: Operations = encoder.operations([shape], wanted=[wanted])
        return found.without_gradients

    def student_tokens(self, batch: TileBatch, moment: Moment, masked: bool = False) -> list[Tokens]:
        """The student's tokens of all crops, with nothing masked: class tokens, and where ``masked`` the patches that
        are compared."""
        wanted = [batch.masked if masked else None, *[None] * (len(batch.crops) - 1)]
        return tokens_of_views(self.student.encoder, self.group_size, batch, moment, wanted=wanted)

    operations = TwoLevels.operations


class RunWithHeads(NamedTuple):
    """A checkpoint, and the sizes of its teacher's tensors by name."""

    found: RunCheckpoint
    shapes: dict[str, Size]


@lru_cache
def run_with_heads(source: str | None) -> RunWithHeads:
    """The run, or checkpoint of one, that ``objective.teacher`` names; a run asks some times over. Raises Fault where it
    has no heads of class tokens and of patches."""
    if source is None:
        raise Fault(
            "objective.teacher= names nothing: give the run whose heads are to be learned from, of objective=dinov2 or"
            " dinov3, or one of its checkpoints."
        )
    folder = checkpoints.resolved(Path(source))
    if "/" in source and ":" not in source and not folder.exists():
        raise Fault(f"objective.teacher={source}: there is no folder {source}; give the run, where it is now.")
    if folder.is_dir() and not (folder / TRANSFORMERS_CONFIG).is_file():
        found = find_checkpoint(folder)
        require_tile_run(found)
        tensors = checkpoints.tensors_of(found.folder)
        if "ibot_centre" in tensors:  # every kind of target has one
            sizes = {name.removeprefix(PREFIX): one.size for name, one in tensors.items() if name.startswith(PREFIX)}
            return RunWithHeads(found, sizes)
    raise Fault(
        f"objective.teacher={source} names no run with heads of class tokens and of patches, which those of"
        " objective=dinov2 and dinov3 have: give one of these, or learn an encoder's features alone, by objective=distil."
    )


def weights_with_heads(source: str) -> dict[str, Tensor]:
    """The weights of that run's teacher, on the CPU. Raises Fault where they aren't finite."""
    with torch.device("cpu"):
        weights = checkpoints.read_network(run_with_heads(source).found.folder, PREFIX)
    try:
        require_finite(weights)
    except ValueError as error:
        raise Fault(f"objective.teacher={source} is not usable: {error}") from error
    return weights


def with_heads(encoder: Any, shapes: dict[str, Size]) -> Network:
    """An encoder, with heads like those whose tensors have these shapes."""

    def head(prefix: str) -> PrototypeHead | None:
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        return PrototypeHead.of_shapes(encoder.width, own) if own else None

    dino = head("dino_head.")
    assert dino is not None
    return Network(encoder, dino, head("ibot_head."))
