"""Which slides are judged when: folds that keep patients together and classes in proportion, over and over."""

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from data.fault import Fault
from data.keyed import rng
from pretrain.slide_probing.judge import passes_of
from pretrain.slide_probing.labels import LabelledSlides, Round
from pretrain.slide_probing.measures import differ


def most_folds(labelled: LabelledSlides) -> tuple[int, int]:
    """How many folds can have a case of each class, and which class has the fewest patients, by its number."""
    pairs = {*zip(labelled.patients, labelled.strata.tolist(), strict=True)}
    patients = np.bincount([stratum for _, stratum in pairs])
    return int(patients.min()), int(patients.argmin())


def rounds_of(labelled: LabelledSlides, folds: int, repeats: int, seed: int) -> list[Round]:
    """The table's own rounds, or ``folds`` × ``repeats``, drawn by ``seed``. Raises Fault where a class has fewer
    patients than folds, a round has none of a class to fit on, or the table's rounds judge nothing that differs."""
    if labelled.rounds is not None:
        for fitted, judged in labelled.rounds:
            _require_fittable(labelled, fitted, judged, "the table")
        _require_judgeable(labelled)
        return labelled.rounds
    strata, (fewest, rarest) = labelled.strata, most_folds(labelled)
    if fewest < folds:
        rare = labelled.classes[rarest] if labelled.classes else "a part of the labels"
        raise Fault(f"folds={folds} is more than there are cases of {rare} ({fewest}): give fewer folds.")
    several = len(set(labelled.patients)) < len(labelled.patients)  # cases of a patient
    patients = labelled.patients if several else None
    rounds: list[Round] = []
    for repeat in range(repeats):
        shuffled = int(rng(seed, "folds", repeat).integers(2**31))
        division = (StratifiedGroupKFold if several else StratifiedKFold)(folds, shuffle=True, random_state=shuffled)
        rounds += [(fitted, judged) for fitted, judged in division.split(strata, strata, patients) if len(judged)]
    if several:
        for fitted, judged in rounds:
            _require_fittable(labelled, fitted, judged, f"folds={folds}")
    return rounds


def _require_fittable(labelled: LabelledSlides, fitted: np.ndarray, judged: np.ndarray, who: str) -> None:
    """``who`` says who is judged when."""
    example = labelled.names[int(judged[0])]
    if len(fitted) < 2:
        raise Fault(f"{who} has {len(fitted)} cases to fit on where {example} is judged: it needs more folds.")
    lacking = set(range(len(labelled.classes))) - set(labelled.values[fitted].tolist()) if labelled.classes else set()
    if lacking:
        raise Fault(
            f"{who} has no case of {labelled.classes[min(lacking)]} to fit on where {example} is judged: every class"
            " must be on that side too."
        )
    if labelled.kind == "number" and not differ(labelled.kind, labelled.values[fitted]):
        raise Fault(
            f"{who} has one label only, {labelled.values[fitted[0]]:g}, to fit on where {example} is judged: there is"
            " nothing to learn."
        )


def _require_judgeable(labelled: LabelledSlides) -> None:
    """Raise Fault where in none of the passes over the table's rounds a figure can be told."""
    assert labelled.rounds is not None
    passes = [np.concatenate([labelled.rounds[number][1] for number in one]) for one in passes_of(labelled.rounds)]
    if any(differ(labelled.kind, labelled.values[judged]) for judged in passes):
        return
    judged = passes[0]
    who = f"{labelled.names[int(judged[0])]} alone" if len(judged) == 1 else f"{len(judged)} cases"
    what = (
        "of no two of them it is known who came first"
        if labelled.kind == "survival"
        else f"all of them are {labelled.classes[int(labelled.values[judged[0]])]}"
        if labelled.classes
        else f"all of their labels are {labelled.values[judged[0]]:g}"
    )
    why = "one case can't be held against others" if len(judged) == 1 else what
    raise Fault(f"the table has {who} to judge by, and {why}: put other cases on that side.")
