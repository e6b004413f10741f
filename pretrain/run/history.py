"""A run's record as alarms see it: of each figure its last values with their steps, and what is asked of all of
them."""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

REMEMBERED = 4096  # values of each figure that rules can look back on
SETTLED = (
    1000  # steps, or the warm-up where it is shorter: before that, features and prototypes are those of random weights
)


@dataclass(frozen=True)
class Facts:
    """What rules need to know of a run beside its record."""

    prototypes: Mapping[str, int]  # of each kind of target; the largest entropy is the logarithm of it
    settled: int  # the step from which features can be judged
    chance_losses: Mapping[str, Sequence[str]] = field(default_factory=dict)  # see `Objective.chance_losses`
    settings: Mapping[str, Any] | None = None  # what the run has, ``objective.spread`` say, and its value; None: any

    def has(self, setting: str) -> bool:
        """Whether the run has a setting, or a group of that name."""
        return self.settings is None or any(f"{name}.".startswith(f"{setting}.") for name in self.settings)

    def is_set(self, setting: str, value: str) -> bool:
        """Whether the run has that value already."""
        return self.settings is not None and str(self.settings.get(setting)) == value


def known_facts(
    prototypes: Mapping[str, int],
    warmup_steps: int,
    chance_losses: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
) -> Facts:
    """The facts of a run whose objective says how many ``prototypes`` each kind of its targets has."""
    return Facts(prototypes, min(SETTLED, warmup_steps), chance_losses, settings)


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong: its name, the step since which it shows, and a line for people."""

    name: str
    since: int
    says: str


class History:
    """The record as rules see it: of each figure its last values with their steps."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.values: dict[str, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        for record in records:
            self.add(int(record["step"]), record)

    def add(self, step: int, figures: Mapping[str, Any]) -> None:
        """Append the figures of ``step``; what is no finite number is left out."""
        for name, value in figures.items():
            if (
                name != "step"
                and isinstance(value, int | float)
                and not isinstance(value, bool)
                and math.isfinite(value)
            ):
                self.values[name].append((step, float(value)))

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps int64 (n,) and values float64 (n,) of a figure; empty where it was never recorded."""
        found = self.values.get(name, ())
        return np.array([step for step, _ in found], dtype=np.int64), np.array([value for _, value in found])


def since(steps: np.ndarray, bad: np.ndarray, least: int) -> int | None:
    """The step at which the last unbroken run of ``bad`` begins, None where it has fewer than ``least`` members."""
    good = np.flatnonzero(~bad)
    first = 0 if not len(good) else int(good[-1]) + 1
    return int(steps[first]) if len(steps) - first >= least else None


def settled(history: History, name: str, known: Facts) -> tuple[np.ndarray, np.ndarray]:
    """A figure from the step on from which features can be judged."""
    steps, values = history.of(name)
    return steps[steps >= known.settled], values[steps >= known.settled]
