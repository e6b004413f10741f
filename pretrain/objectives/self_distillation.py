"""What DINO and DINOv2 share: a student that predicts its own moving average, and targets that use all prototypes.

teacher  ←EMA─  student
   │               │
global crops    all crops
   └─ centring ────┴─ cross-entropies, which the objective writes down
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from data.fault import Fault
from models.allowed import SHARE, one_of, within
from models.heads import PrototypeHead
from models.operations import Operations
from models.vit import Tokens, VisionTransformer
from pretrain.objectives import teacher as ema
from pretrain.objectives.figures import assignment_figures
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.losses.assignment import ITERATIONS, centred_softmax, moved_centre, sinkhorn_centre
from pretrain.objectives.losses.precision import at_least_float32
from pretrain.objectives.schedules import cosine
from pretrain.objectives.stochastic_depth import kept_of, kept_samples
from pretrain.objectives.tile_batch import Target, TileBatch


class Network(nn.Module):
    """An encoder and its heads: what the student is and what the teacher is. ``ibot_head`` None shares the DINO
    head."""

    def __init__(
        self, encoder: VisionTransformer, dino_head: PrototypeHead, ibot_head: PrototypeHead | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.dino_head, self.ibot_head = encoder, dino_head, ibot_head

    def score_patches(self, patches: Tensor) -> Tensor:
        """Prototype scores ``(M, K)`` of patch tokens ``(M, width)``."""
        return (self.dino_head if self.ibot_head is None else self.ibot_head)(patches)


class Teaching(TypedDict):
    """Settings of every such objective: how targets are centred and sharpened, and how the teacher follows."""

    centring: Annotated[str, one_of("centre", "sinkhorn")]
    student_temperature: Annotated[float, within(above=0)]
    teacher_temperature: Annotated[float, within(above=0)]
    teacher_temperature_start: Annotated[float, within(above=0)]
    teacher_temperature_warmup: Annotated[int, within(least=0)]
    teacher_momentum: Annotated[float, SHARE]
    teacher_momentum_final: Annotated[float, SHARE]


class SelfDistillation(Objective):
    """Student, teacher and targets. A subclass says what the teacher looks at, and writes the loss.

    ``make_network`` is called twice, for student and teacher. ``prototypes`` names the kinds of target (``dino``,
    ``ibot``) and how many prototypes each has; each has a centre, the buffer ``<kind>_centre``.
    """

    reading = (
        "Its level says little by itself: the class-token terms together start near the logarithm of the number of"
        " prototypes, and the teacher's temperature moves it. Watch for a class-token loss that stays where it started"
        " (nothing learned)."
    )
    chance_losses: ClassVar[Mapping[str, Sequence[str]]] = {"dino": ("dino_global", "dino_local")}
    all_patches: ClassVar[bool] = False
    """Whether the loss is given the student's patch tokens of all crops, in place of the masked ones alone."""

    def __init__(
        self,
        make_network: Callable[[], Network],
        prototypes: dict[str, int],
        *,
        group_size: int,
        **teaching: Unpack[Teaching],
    ) -> None:
        super().__init__()
        self.student, self.teacher = make_network(), make_network()
        self.teacher.requires_grad_(False)
        self.group_size, self.centring = group_size, teaching["centring"]
        self.student_temperature, self.teaching = teaching["student_temperature"], teaching
        self.prototypes = prototypes
        for kind, count in prototypes.items():
            self.register_buffer(f"{kind}_centre", torch.zeros(1, count))
        self._logits: dict[str, tuple[Tensor, int]] = {}  # per kind, the step's sum of teacher logits and their number

    @abstractmethod
    def teacher_tokens(self, batch: TileBatch) -> dict[str, Tensor]:
        """Per kind of target, the teacher's tokens ``(n, width)`` that become targets."""

    @abstractmethod
    def teacher_scores(self, kind: str, tokens: Tensor) -> Tensor:
        """Prototype scores ``(n, K)`` of the teacher's tokens."""

    def trained(self) -> dict[str, nn.Module]:
        return dict(self.student.named_children())

    def frozen(self) -> dict[str, nn.Module]:
        return {f"teacher.{name}": module for name, module in self.teacher.named_children()}

    def prototype_counts(self) -> dict[str, int]:
        return self.prototypes

    def start(self) -> None:
        ema.copy(self.student, self.teacher)
        for _, centre in self.named_buffers(recurse=False):
            centre.zero_()

    def teacher_temperature(self, moment: Moment) -> float:
        """Linear from its start to its value over the warm-up, constant after it."""
        value, start = self.teaching["teacher_temperature"], self.teaching["teacher_temperature_start"]
        warmup = self.teaching["teacher_temperature_warmup"]
        return cosine(moment.step, peak=value, final=value, total=max(warmup, 1), warmup=warmup, start=start)

    def teacher_momentum(self, moment: Moment) -> float:
        """A half cosine over the whole run."""
        first, last = self.teaching["teacher_momentum"], self.teaching["teacher_momentum_final"]
        return cosine(moment.step, peak=first, final=last, total=moment.steps)

    def schedules(self, moment: Moment) -> dict[str, Tensor]:
        """Figures to log."""
        return {
            "teacher_temperature": torch.tensor(self.teacher_temperature(moment)),
            "momentum": torch.tensor(self.teacher_momentum(moment)),
        }

    @torch.no_grad()
    def prepare(self, parts: Sequence[TileBatch], moment: Moment) -> list[TileBatch]:
        """The teacher sees all micro-batches before the student sees the first: its targets belong to the global batch.

        Its scores of several micro-batches are too many to hold (n × K numbers each, gigabytes for 131,072 prototypes).
        They are computed anew from its tokens wherever they are wanted, which costs a head's pass and no encoder's.
        """
        temperature = self.teacher_temperature(moment)
        tokens = [self.teacher_tokens(part) for part in parts]
        targets: list[dict[str, Target]] = [{} for _ in parts]
        for kind in tokens[0]:
            scores = [self._scores(kind, part[kind], hold=len(parts) == 1) for part in tokens]
            if self.centring == "sinkhorn":
                centre = sinkhorn_centre(lambda scores=scores: (score() for score in scores), temperature)  # type: ignore[misc]
            else:
                centre = getattr(self, f"{kind}_centre").clone()
                sums = torch.cat([at_least_float32(score()).sum(0, keepdim=True) for score in scores]).sum(
                    0, keepdim=True
                )
                self._logits[kind] = sums, sum(len(part[kind]) for part in tokens)
            for target, score in zip(targets, scores, strict=True):
                target[kind] = lambda score=score, centre=centre: centred_softmax(score(), centre, temperature)  # type: ignore[misc]
        return [replace(part, targets=target) for part, target in zip(parts, targets, strict=True)]

    def _scores(self, kind: str, tokens: Tensor, hold: bool) -> Callable[[], Tensor]:
        if hold:
            scores = self.teacher_scores(kind, tokens)
            return lambda: scores
        return torch.no_grad()(lambda: self.teacher_scores(kind, tokens))

    @torch.no_grad()
    def look(self, parts: Sequence[TileBatch], moment: Moment) -> dict[str, float]:
        """How the teacher uses its prototypes on these micro-batches, per kind of target; see `assignment_figures`."""
        temperature = self.teacher_temperature(moment)
        figures: dict[str, float] = {}
        tokens = [self.teacher_tokens(part) for part in parts]
        for kind in tokens[0]:
            scores = [self._scores(kind, part[kind], hold=len(parts) == 1) for part in tokens]
            if self.centring == "sinkhorn":
                centre = sinkhorn_centre(lambda scores=scores: (score() for score in scores), temperature)  # type: ignore[misc]
            else:
                centre = getattr(self, f"{kind}_centre")
            figures |= assignment_figures((centred_softmax(score(), centre, temperature) for score in scores), kind)
        return figures

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
        encoder, (images, views) = self.student.encoder, batch.crops[0]
        kept = kept_samples(
            [(views, encoder.tokens_per_crop(crops.shape[-1])) for crops, views in batch.crops],
            len(images) // views,
            group=self.group_size,
            rate=encoder.drop_path,
            depth=len(encoder.blocks),
            seed=moment.seed,
            step=moment.step,
            first=moment.first,
            device=images.device,
        )
        others = [None] * (len(batch.crops) - 1)
        masks = [batch.masks.flatten(1) if masked else None, *others]
        wanted = None if self.all_patches else [batch.masked if masked else None, *others]
        return encoder([crops for crops, _ in batch.crops], masks, kept, wanted=wanted)

    def encoder_operations(self, batch: TileBatch, masked: int) -> Operations:
        """Of both encoders on a micro-batch whose loss is given ``masked`` patches."""
        encoder = self.student.encoder
        shapes = [(len(images), encoder.tokens_per_crop(images.shape[-1])) for images, _ in batch.crops]
        wanted = [crops + (0 if i else masked) for i, (crops, _) in enumerate(shapes)]
        group, rate = self.group_size, encoder.drop_path
        kept = [
            (kept_of(views * group, rate) * crops // (views * group), tokens)
            for (crops, tokens), (_, views) in zip(shapes, batch.crops, strict=True)
        ]
        student = encoder.operations(shapes, kept if rate else None, None if self.all_patches else wanted)
        return student + self.teacher.encoder.operations(shapes[:1], wanted=wanted[:1]).without_gradients

    def head_operations(self, head: str, student: int, teacher: int, parts: int) -> Operations:
        """Of both networks' ``head`` on so many tokens of a micro-batch; the teacher's scores of several are computed
        anew wherever `prepare` or a target asks for them."""
        asked = 1 if parts == 1 else 1 + (ITERATIONS if self.centring == "sinkhorn" else 1)
        own, targets = getattr(self.student, head), getattr(self.teacher, head)
        return own.operations(student) + targets.operations(asked * teacher).without_gradients

    def after_step(self, moment: Moment) -> None:
        # A centre moves once the step has been taken, so it is one step late, as DINO's and DINOv2's are.
        ema.ema_update(self.student, self.teacher, self.teacher_momentum(moment))
        for kind, (sums, rows) in self._logits.items():
            centre = getattr(self, f"{kind}_centre")
            centre.copy_(moved_centre(centre, sums, rows))
        self._logits.clear()

    def after_skip(self) -> None:
        self._logits.clear()


def by_view(scores: Tensor, batch: TileBatch) -> list[Tensor]:
    """Class-token scores ``(all crops, K)`` → per crop size ``(views, tiles, K)``."""
    parts = scores.split([len(crops) for crops, _ in batch.crops])
    return [part.unflatten(0, (views, -1)) for part, (_, views) in zip(parts, batch.crops, strict=True)]
