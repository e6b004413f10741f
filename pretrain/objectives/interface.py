"""What the stages ask of an objective. A new one is one file, in ``pretrain/objectives/`` or in a user's folder, with
such a class.

`Objective` is all that the tile stage, plan and doctor know of one, and `SlideObjective` all that the slide stage knows
beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from data.stochastic_depth import StochasticDepth
from data.tiles.crops import FurtherViews
from models.operations import Operations
from models.sequence_parallel import Group

BACKBONE = "encoder"  # what every objective calls the network that a run is for


@dataclass(frozen=True)
class Moment:
    """Where in the run a loss is computed; all that schedules and random draws may depend on."""

    step: int  # optimiser steps done before this one
    steps: int  # steps that the schedules are laid out for: those of the whole run, or more
    seed: int
    first: int = 0  # number in the global batch of the micro-batch's first sample


class Objective(nn.Module, ABC):
    """A loss together with the networks it trains and those it keeps beside them (a teacher, a centre)."""

    stage: ClassVar[str] = "tile"
    """The command that it is for."""
    learns: ClassVar[str] = "from tiles without labels"
    """For the report, what goes behind 'A tile encoder learned'."""
    masks: ClassVar[bool] = False
    """Whether it hides parts of what it sees. The tile stage then masks patches of global crops as ``data.masks`` says,
    the slide stage tiles as ``data.mask_ratio`` says; else ``TileBatch.masks`` is False throughout, and all of a
    `SlideBatch` is visible."""
    reading: ClassVar[str] = ""
    """For the report, sentences on where its losses start and what they tell."""

    chance_losses: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Of kinds of target of `prototype_counts`, the losses whose sum is the logarithm of that number as long as nothing
    is learned; an alarm says when it stays there."""

    @classmethod
    def further_views(cls, settings: Mapping[str, Any]) -> Sequence[FurtherViews]:
        """Kinds of view that the tile stage cuts beside global and local ones, by the objective's ``settings``. They
        follow in ``TileBatch.crops``, in this order."""
        return ()

    @classmethod
    def check_views(cls, global_count: int, local_count: int) -> None:
        """Raise ValueError, with the way out, for so many global and local crops of a tile as it can't learn from."""

    def stochastic_depth(self) -> StochasticDepth | None:
        """Which crops skip branches, if any do: the tile stage's loader draws it, into ``TileBatch.kept``."""
        return None

    @abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """The networks that the optimiser updates, by name, ``encoder`` among them; gradients are clipped for each by
        itself."""

    def frozen(self) -> dict[str, nn.Module]:
        """The networks that are sharded like the trained ones but never see a gradient (a teacher)."""
        return {}

    def rests_on(self) -> Mapping[str, str]:
        """What it was given from elsewhere and its checkpoints don't hold, by the setting that says where it lies, each
        with a hash: a run goes on with the same, wherever that lies now."""
        return {}

    def prototype_counts(self) -> Mapping[str, int]:
        """Of each kind of target that `look` gives figures of, ``teacher_entropy/<kind>`` and so on, its number of
        prototypes."""
        return {}

    def prepare(self, parts: Sequence[Any], moment: Moment) -> Sequence[Any]:
        """Called once a step with all its micro-batches, before the first loss; `loss` gets what it returns.

        What depends on the whole batch (targets that use all prototypes) is found out here.
        """
        return parts

    @abstractmethod
    def loss(self, batch: Any, moment: Moment) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The loss of one micro-batch, a scalar whose mean over equal micro-batches and ranks is optimised, and figures
        to log.

        A network is called as a whole, ``self.projector(x)``: its parameters are gathered for the call, and only then.
        """

    def operations(self, parts: Sequence[Any]) -> Operations:
        """Floating-point operations of a step on these micro-batches, for the record's ``flop_utilisation``: sums of
        what its networks say of their passes.

        Optional, and not inherited: a subclass may compute more than its parent says, so it says so itself (by
        ``operations = DINOv2.operations`` where nothing is added), as do subclasses of our networks.
        """
        raise NotImplementedError

    def look(self, parts: Sequence[Any], moment: Moment) -> dict[str, float]:
        """Figures of all ranks' micro-batches that are too costly for every step, asked for now and then, after a
        step."""
        return {}

    def start(self) -> None:
        """Called once, after the trained networks have their first values (a teacher is copied here)."""

    def after_step(self, moment: Moment) -> None:
        """Called after each optimiser step that was taken, never after one that was skipped."""

    def after_skip(self) -> None:
        """Called instead when a step was skipped for a loss or gradient that is not finite."""


class SlideObjective(Objective):
    """An objective of the slide stage; its batches are `SlideBatch`, its ``encoder`` a slide encoder, which is given
    what ``SlideBatch.inputs`` says: embeddings as ``data.inputs`` wants them."""

    stage = "slide"
    learns = "from tile embeddings without labels"
    crops: ClassVar[bool] = False
    """Whether its batches are `CropBatch`, crops of slides' grids as ``data.crops`` says; its masks are then those of
    ``data.crops`` too."""
    score: ClassVar[str] = ""
    """The figure of `evaluate` by which the best checkpoint is told, higher is better; empty: none is."""
    evaluation_passes: ClassVar[int] = 0
    """How often `judged` passes a held-out slide forward, for the plan."""

    several_stores: ClassVar[bool] = False
    """Whether it reads ``data.further``, stores of the same tiles by other tile encoders. Its encoder then has an input
    projection for each, and a batch its ``further``."""

    @classmethod
    def clusters(cls, settings: Mapping[str, Any]) -> int:
        """Into how many clusters the store's tiles are to be cut for it, by the objective's ``settings``; their centres
        come as ``SlideBatch.centres``. 0: none."""
        return 0

    def share_slides(self, group: Group) -> None:
        """Let the processes of ``group`` share every slide's tokens; they get the same batches. Raises ValueError where
        that can't be."""
        if group is not None:
            raise ValueError(f"{type(self).__name__} can't share a slide over processes")

    def judged(self, batch: Any) -> Mapping[str, Tensor]:
        """What `evaluate` wants to know of a batch of held-out sequences: tensors ``(B, …)`` by name, a row a sequence
        (of crops: a row a slide that they are of). Called without gradients and outside of a step; each sequence is judged by one rank."""
        return {}

    def evaluate(self, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Figures of the rows ``(N, …)`` of all held-out sequences that were judged, float64, in an order that is the
        same on any number of ranks."""
        return {}
