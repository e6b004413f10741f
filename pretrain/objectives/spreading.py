"""The regulariser that keeps class tokens apart, as settings name it, and its weight over a run."""

from typing import Annotated, TypedDict

from torch import Tensor

from models.allowed import RANGE, SHARE, idle_where, one_of, within
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.spread import SPREADS
from pretrain.objectives.schedules import ramp


class Spreading(TypedDict):
    """Settings of every objective with such a term."""

    spread: Annotated[str, one_of(*SPREADS), idle_where("spread_weight", 0)]
    spread_weight: Annotated[float, within(least=0)]
    spread_concentration: Annotated[
        float, within(above=0), idle_where("spread", "koleo", "sigreg"), idle_where("spread_weight", 0)
    ]
    spread_ramp: Annotated[list[float], RANGE, SHARE, idle_where("spread_weight", 0)]


class Spread:
    """``(features (N, D)) → scalar`` over groups of ``group`` rows, low where they are apart."""

    def __init__(self, settings: Spreading, group: int) -> None:
        self.term, self.group, self.concentration = SPREADS[settings["spread"]], group, settings["spread_concentration"]
        self.peak, self.ends = settings["spread_weight"], settings["spread_ramp"]

    def __call__(self, features: Tensor, moment: Moment) -> Tensor:
        return self.term(features, self.group, moment, self.concentration)

    def weight(self, moment: Moment) -> float:
        """That of each global view: nothing up to the first share of the run, all of it from the second on."""
        first, last = self.ends
        return self.peak * ramp(moment.step, begin=first * moment.steps, end=last * moment.steps)
