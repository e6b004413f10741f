"""Which slides are judged when: folds that keep patients together and classes in proportion, over and over."""

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from data.fault import Fault
from data.keyed import rng
from pretrain.slide_probing.labels import LabelledSlides, Round


def most_folds(labelled: LabelledSlides) -> tuple[int, int]:
    """How many folds can have a case of each class, and which class has the fewest patients, by its number."""
    pairs = {*zip(labelled.patients, labelled.strata.tolist(), strict=True)}
    patients = np.bincount([stratum for _, stratum in pairs])
    return int(patients.min()), int(patients.argmin())


def rounds_of(labelled: LabelledSlides, folds: int, repeats: int, seed: int) -> list[Round]:
    """The table's own rounds, or ``folds`` × ``repeats``, drawn by ``seed``. Raises Fault where a class has fewer
    patients than folds, or a round has none of a class to fit on."""
    if labelled.rounds is not None:
        for fitted, judged in labelled.rounds:
            _require_fittable(labelled, fitted, judged, "the table")
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
