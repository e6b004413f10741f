"""Which slides are judged when: folds that keep patients together and classes in proportion, over and over."""

import numpy as np
from sklearn.model_selection import StratifiedKFold

from data.fault import Fault
from data.keyed import rng
from pretrain.slide_probing.labels import LabelledSlides, Round


def rounds_of(labelled: LabelledSlides, folds: int, repeats: int, seed: int) -> list[Round]:
    """The table's own rounds, or ``folds`` × ``repeats``, drawn by ``seed``; a bag is a patient, so patients stay
    together. Raises Fault where a class has fewer cases than folds."""
    if labelled.rounds is not None:
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
