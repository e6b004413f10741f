"""What the trainer asks of an objective. A new one is one file in ``pretrain/objectives/`` with such a class."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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

    @abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """The networks that the optimiser updates, by name, ``encoder`` among them; gradients are clipped for each by itself."""

    def frozen(self) -> dict[str, nn.Module]:
        """The networks that are sharded like the trained ones but never see a gradient (a teacher)."""
        return {}

    def prepare(self, parts: Sequence[Any], moment: Moment) -> Sequence[Any]:
        """Called once a step with all its micro-batches, before the first loss; `loss` gets what it returns.

        What depends on the whole batch (targets that use all prototypes) is found out here.
        """
        return parts

    @abstractmethod
    def loss(self, batch: Any, moment: Moment) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The loss of one micro-batch, a scalar whose mean over equal micro-batches and ranks is optimised, and figures to log.

        A network is called as a whole, ``self.projector(x)``: its parameters are gathered for the call, and only then.
        """

    def look(self, parts: Sequence[Any], moment: Moment) -> dict[str, float]:
        """Figures of all ranks' micro-batches that are too costly for every step, asked for now and then, after a step."""
        return {}

    def start(self) -> None:
        """Called once, after the trained networks have their first values (a teacher is copied here)."""

    def after_step(self, moment: Moment) -> None:
        """Called after each optimiser step that was taken, never after one that was skipped."""

    def after_skip(self) -> None:
        """Called instead when a step was skipped for a loss or gradient that is not finite."""
