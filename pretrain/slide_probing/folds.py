"""Which slides are judged when: folds that keep patients together and classes in proportion, over and over."""

import numpy as np
from sklearn.model_selection import StratifiedKFold

from data.fault import Fault
from data.keyed import rng
from pretrain.slide_probing.labels import LabelledSlides, Round


def rounds_of(labelled: LabelledSlides, folds: int, repeats: int, seed: int) -> list[Round]:
    """The table's own rounds, or ``folds`` × ``repeats``, drawn by ``seed``; a bag is a patient, so patients stay
    together. Raises Fault where a class has fewer cases
    than folds, or a round of the table has none of a class to fit on."""
    if labelled.rounds is not None:
        for fitted, judged in labelled.rounds:
            _require_fittable(labelled, fitted, judged)
        return labelled.rounds
    strata = labelled.strata
    fewest = int(np.bincount(strata).min())
    if fewest < folds:
        rare = labelled.classes[int(np.bincount(strata).argmin())] if labelled.classes else "a part of the labels"
        raise Fault(f"folds={folds} is more than there are cases of {rare} ({fewest}): give fewer folds.")
    rounds: list[Round] = []
    for repeat in range(repeats):
        shuffled = int(rng(seed, "folds", repeat).integers(2**31))
        splits = StratifiedKFold(folds, shuffle=True, random_state=shuffled).split(strata, strata)
        rounds += [(fitted, judged) for fitted, judged in splits]
    return rounds


def _require_fittable(labelled: LabelledSlides, fitted: np.ndarray, judged: np.ndarray) -> None:
    example = labelled.names[int(judged[0])]
    if len(fitted) < 2:
        raise Fault(f"the table has {len(fitted)} cases to fit on where {example} is judged: it needs more folds.")
    lacking = set(range(len(labelled.classes))) - set(labelled.values[fitted].tolist()) if labelled.classes else set()
    if lacking:
        raise Fault(
            f"the table has no case of {labelled.classes[min(lacking)]} to fit on where {example} is judged: every class"
            " must be on that side too."
        )
