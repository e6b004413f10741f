"""Predictions of many rounds become figures: each with its interval, and beside those of the mean of the tiles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.keyed import rng
from pretrain.slide_probing.labels import LabelledSlides, Round
from pretrain.slide_probing.measures import MEASURES, Measure

RESAMPLES = 1000  # of a bootstrap
INTERVAL = (2.5, 97.5)  # percentiles

Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Numbers of the bags to fit on and of those to predict → predictions of these."""


@dataclass(frozen=True)
class Judged:
    """``predictions`` a round; ``resampled``: per measure, the figure of each bootstrap draw ``(resamples,)``."""

    predictions: list[np.ndarray]
    figures: dict[str, float]
    resampled: dict[str, np.ndarray]


class Judge:
    """The same question to every row: the rounds, the measures of the kind of label, and the draws of patients."""

    def __init__(
        self, labelled: LabelledSlides, rounds: Sequence[Round], seed: int, resamples: int = RESAMPLES
    ) -> None:
        self.labelled, self.rounds, self.passes = labelled, rounds, passes_of(rounds)
        self.kind = "grades" if labelled.ordered else labelled.kind
        place = {patient: number for number, patient in enumerate(dict.fromkeys(labelled.patients))}
        draw, n = rng(seed, "bootstrap"), len(place)
        # How often each patient is in a draw, the same for all rows, so that differences are paired.
        drawn = [np.bincount(draw.integers(n, size=n), minlength=n) for _ in range(resamples)]
        # … and so are all cases of a patient, of which there may be several: (resamples, cases).
        self.times = np.array(drawn).reshape(resamples, n)[:, [place[patient] for patient in labelled.patients]]

    @property
    def measures(self) -> list[str]:
        """Names of the figures of every row."""
        return list(MEASURES[self.kind])

    @property
    def main(self) -> str:
        """The measure that rows are compared by."""
        return self.measures[0]

    def __call__(self, predict: Predict) -> Judged:
        """Each round fits anew. A measure is taken of all that a pass over the cases predicts, and averaged over
        passes: in the few cases of one fold, R² and the AUROC of rare classes mean nothing."""
        predictions = [predict(fitted, judged) for fitted, judged in self.rounds]
        measures = MEASURES[self.kind]
        passes = [
            (np.concatenate([self.rounds[i][1] for i in numbers]), np.concatenate([predictions[i] for i in numbers]))
            for numbers in self.passes
        ]
        figures = {name: self._mean(measure, passes, None) for name, measure in measures.items()}
        resampled = {
            name: np.array([self._mean(measure, passes, times) for times in self.times])
            for name, measure in measures.items()
        }
        return Judged(predictions, figures, resampled)

    def _mean(
        self, measure: Measure, passes: Sequence[tuple[np.ndarray, np.ndarray]], times: np.ndarray | None
    ) -> float:
        """Over ``passes``, each the cases judged and their predictions; ``times``: how often each case counts."""
        found = []
        for judged, prediction in passes:
            which = np.arange(len(judged)) if times is None else np.repeat(np.arange(len(judged)), times[judged])
            if len(which) > 1:
                found.append(measure(self.labelled.values[judged[which]], prediction[which]))
        told = [value for value in found if np.isfinite(value)]
        return float(np.mean(told)) if told else float("nan")

    def row(self, judged: Judged, beside: Judged) -> dict[str, Any]:
        """A row of the JSON: each figure with its interval, and how much it is above ``beside``'s with that one's."""
        row: dict[str, Any] = {"predictions": [np.round(some, 6).tolist() for some in judged.predictions]}
        for name, value in judged.figures.items():
            above = judged.resampled[name] - beside.resampled[name]
            row[name] = {
                "value": known(value),
                "interval": interval(judged.resampled[name]),
                "above_mean": known(value - beside.figures[name]),
                "above_mean_interval": interval(above),
            }
        return row


def passes_of(rounds: Sequence[Round]) -> list[list[int]]:
    """Numbers of rounds that judge each case once at most: the folds of one division, or a round of its own."""
    passes: list[list[int]] = []
    seen: set[int] = set()
    for number, (_, judged) in enumerate(rounds):
        if not passes or seen & set(judged.tolist()):
            passes.append([])
            seen = set()
        passes[-1].append(number)
        seen |= set(judged.tolist())
    return passes


def interval(draws: np.ndarray) -> list[float | None]:
    """Between which 95 of 100 draws lie; draws that can't be told don't count."""
    told = draws[np.isfinite(draws)]
    return np.percentile(told, INTERVAL).tolist() if len(told) else [None, None]


def known(value: float) -> float | None:
    """A figure as JSON has it: None where it can't be told."""
    return value if np.isfinite(value) else None
