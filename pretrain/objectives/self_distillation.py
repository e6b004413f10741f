"""What DINO, DINOv2 and slide iBOT share: a student that predicts its own moving average, and targets that use all
prototypes.

teacher  ←EMA─  student
   │               │
global crops    all crops
   └─ centring ────┴─ cross-entropies, which the objective writes down
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from models.allowed import PROTOTYPES, SHARE, one_of, within
from models.heads import PrototypeHead
from models.operations import Operations
from pretrain.objectives import teacher as ema
from pretrain.objectives.figures import assignment_figures
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.losses.assignment import ITERATIONS, centred_softmax, moved_centre, sinkhorn_centre
from pretrain.objectives.losses.precision import wide
from pretrain.objectives.schedules import cosine
from pretrain.objectives.spreading import Spreading
from pretrain.objectives.tile_batch import Target


class Network(nn.Module):
    """An encoder and its heads: what the student is and what the teacher is. ``ibot_head`` None shares the DINO
    head."""

    def __init__(self, encoder: Any, dino_head: PrototypeHead, ibot_head: PrototypeHead | None = None) -> None:
        super().__init__()
        self.encoder, self.dino_head, self.ibot_head = encoder, dino_head, ibot_head

    def score_patches(self, patches: Tensor) -> Tensor:
        """Prototype scores ``(M, K)`` of patch tokens ``(M, width)``."""
        return (self.dino_head if self.ibot_head is None else self.ibot_head)(patches)


class Sharpening(TypedDict):
    """Settings of every such objective: how targets are sharpened, and how the teacher follows."""

    student_temperature: Annotated[float, within(above=0)]
    teacher_temperature: Annotated[float, within(above=0)]
    teacher_temperature_start: Annotated[float, within(above=0)]
    teacher_temperature_warmup: Annotated[int, within(least=0)]
    teacher_momentum: Annotated[float, SHARE]
    teacher_momentum_final: Annotated[float, SHARE]


class Teaching(Sharpening):
    """The same, and how targets are centred."""

    centring: Annotated[str, one_of("centre", "sinkhorn")]


class ClassHead(TypedDict):
    """Settings of the head of class tokens."""

    prototypes: Annotated[int, PROTOTYPES]
    bottleneck: Annotated[int, within(least=1)]
    hidden: Annotated[int, within(least=1)]
    head_layers: Annotated[int, within(least=1)]


class ClassWeight(Spreading):
    """Weights of what is learned from class tokens: of their assignments, and of their spread."""

    dino_weight: Annotated[float, within(least=0)]


class LevelWeights(ClassWeight):
    """The same, and that of masked parts' assignments."""

    ibot_weight: Annotated[float, within(least=0)]


class ClassLevel(ClassHead, ClassWeight):
    """Settings of what is learned from class tokens beside something else."""


class SeparateLevels(ClassHead, LevelWeights):
    """Those of what is learned from class tokens and from masked parts, through a head each."""

    ibot_prototypes: Annotated[int, PROTOTYPES]
    ibot_bottleneck: Annotated[int, within(least=1)]


class Levels(SeparateLevels):
    """The same, whether masked parts have a head of their own, and whether prototypes keep the norm 1."""

    separate_ibot_head: bool
    frozen_prototype_norms: bool


class TeachingOfLevels(Levels, Teaching):
    """Both."""


class SharpeningOfSeparateLevels(SeparateLevels, Sharpening):
    """Both, where heads are separate and Sinkhorn-Knopp centres."""


def two_level_network(encoder: Any, levels: Levels, normed: bool = True) -> Network:
    """An encoder with the heads that the settings say, their prototypes weight-normed where ``normed``."""

    def head(prototypes: int, bottleneck: int) -> PrototypeHead:
        return PrototypeHead(
            encoder.width,
            prototypes=prototypes,
            bottleneck=bottleneck,
            hidden=levels["hidden"],
            layers=levels["head_layers"],
            normed=normed,
            frozen_norms=levels["frozen_prototype_norms"],
        )

    dino = head(levels["prototypes"], levels["bottleneck"])
    separate = levels["separate_ibot_head"]
    return Network(encoder, dino, head(levels["ibot_prototypes"], levels["ibot_bottleneck"]) if separate else None)


def prototypes_of_levels(levels: Levels) -> dict[str, int]:
    """How many each kind of target has."""
    shared = levels["prototypes"]
    return {"dino": shared, "ibot": levels["ibot_prototypes"] if levels["separate_ibot_head"] else shared}


def teaching_of(settings: Teaching) -> Teaching:
    """The part of them that is `Teaching`."""
    return {name: settings[name] for name in Teaching.__annotations__}  # type: ignore[literal-required, return-value]


class Taught(NamedTuple):
    """Tokens ``(n, width)`` of a teacher, whose scores move the centre. ``rows`` ``(m,)`` int64: those that become
    targets; None: all."""

    tokens: Tensor
    rows: Tensor | None = None

    def targets(self, of: Tensor) -> Tensor:
        """The targets' rows of ``of`` ``(n, …)``."""
        return of if self.rows is None else of.index_select(0, self.rows)


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

    def __init__(
        self,
        make_network: Callable[[], Network],
        prototypes: dict[str, int],
        **teaching: Unpack[Teaching],
    ) -> None:
        super().__init__()
        self.student, self.teacher = make_network(), make_network()
        self.teacher.requires_grad_(False)
        self.centring = teaching["centring"]
        self.student_temperature, self.teaching = teaching["student_temperature"], teaching
        self.prototypes = prototypes
        for kind, count in prototypes.items():
            self.register_buffer(f"{kind}_centre", torch.zeros(1, count))
        self._logits: dict[str, tuple[Tensor, int]] = {}  # per kind, the step's sum of teacher logits and their number

    @property
    def source_of_targets(self) -> Network:
        """Whose tokens and scores become targets: the moving average."""
        return self.teacher

    @abstractmethod
    def teacher_tokens(self, batch: Any) -> dict[str, Taught]:
        """Per kind of target, the teacher's tokens of a micro-batch."""

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
    def targets_of(self, parts: Sequence[Any], moment: Moment) -> list[dict[str, Target]]:
        """The teacher sees all micro-batches before the student sees the first: its targets belong to the global batch.

        Its scores of several micro-batches are too many to hold (n × K numbers each, gigabytes for 131,072 prototypes).
        They are computed anew from its tokens wherever they are wanted, which costs a head's pass and no encoder's.
        """
        return self.targets_from([self.teacher_tokens(part) for part in parts], moment)

    @torch.no_grad()
    def targets_from(self, tokens: Sequence[Mapping[str, Taught]], moment: Moment) -> list[dict[str, Target]]:
        """`targets_of` micro-batches whose teacher's tokens are there."""
        temperature = self.teacher_temperature(moment)
        targets: list[dict[str, Target]] = [{} for _ in tokens]
        for kind in tokens[0]:
            scores, sums = self._scores(kind, [part[kind] for part in tokens])
            centre = self._centre(kind, scores, temperature).clone()
            if sums:
                self._logits[kind] = (
                    torch.cat(sums).sum(0, keepdim=True),
                    sum(len(part[kind].tokens) for part in tokens),
                )
            for target, score in zip(targets, scores, strict=True):
                target[kind] = lambda score=score, centre=centre: centred_softmax(score(), centre, temperature)  # type: ignore[misc]
        return targets

    def _scores(self, kind: str, taught: Sequence[Taught]) -> tuple[list[Target], list[Tensor]]:
        """Of each micro-batch what computes its targets' scores, and where a centre moves, the sum ``(1, K)`` of all
        its tokens' scores."""
        scores: list[Target] = []
        sums: list[Tensor] = []
        for part in taught:
            found = None
            if self.centring == "centre":
                every = self.teacher_scores(kind, part.tokens)
                sums.append(every.sum(0, keepdim=True, dtype=wide(every.dtype)))
                found = part.targets(every) if len(taught) == 1 else None
            elif len(taught) == 1:
                found = self.teacher_scores(kind, part.targets(part.tokens))
            anew = torch.no_grad()(lambda part=part: self.teacher_scores(kind, part.targets(part.tokens)))  # type: ignore[misc]
            scores.append(anew if found is None else lambda found=found: found)  # type: ignore[misc]
        return scores, sums

    def _centre(self, kind: str, scores: Sequence[Target], temperature: float) -> Tensor:
        if self.centring == "sinkhorn":
            return sinkhorn_centre(lambda: (score() for score in scores), temperature)
        centre: Tensor = getattr(self, f"{kind}_centre")
        return centre

    @torch.no_grad()
    def look(self, parts: Sequence[Any], moment: Moment) -> dict[str, float]:
        """How the teacher uses its prototypes on these micro-batches, per kind of target; see `assignment_figures`."""
        temperature = self.teacher_temperature(moment)
        figures: dict[str, float] = {}
        tokens = [self.teacher_tokens(part) for part in parts]
        for kind in tokens[0]:
            scores, _ = self._scores(kind, [part[kind] for part in tokens])
            centre = self._centre(kind, scores, temperature)
            figures |= assignment_figures((centred_softmax(score(), centre, temperature) for score in scores), kind)
        return figures

    def head_operations(
        self, head: str, student: int, teacher: int, parts: int, moving: int | None = None
    ) -> Operations:
        """Of both networks' ``head`` on so many tokens of a micro-batch, the teacher's being its targets; ``moving``: of
        the teacher's, those that move a centre, where they are others. The teacher's scores of several micro-batches are
        computed anew wherever `targets_of` or a target asks for them."""
        if self.centring == "sinkhorn":
            asked = teacher if parts == 1 else (1 + ITERATIONS) * teacher
        else:
            asked = (teacher if moving is None else moving) + (0 if parts == 1 else teacher)
        own, targets = getattr(self.student, head), getattr(self.source_of_targets, head)
        return own.operations(student) + targets.operations(asked).without_gradients

    def after_step(self, moment: Moment) -> None:
        # A centre moves once the step has been taken, so it is one step late, as DINO's and DINOv2's are.
        ema.ema_update(self.student, self.teacher, self.teacher_momentum(moment))
        for kind, (sums, rows) in self._logits.items():
            centre = getattr(self, f"{kind}_centre")
            centre.copy_(moved_centre(centre, sums, rows))
        self._logits.clear()

    def after_skip(self) -> None:
        self._logits.clear()
