"""Labelled images of one folder into those that a classifier is fitted on and those that it is asked."""

import math
from pathlib import Path

import numpy as np

from data.ahead import map_ahead
from data.fault import Fault
from data.keyed import rng
from pretrain.probing.images import LabelledImages, image_or_fault
from pretrain.probing.slide_groups import groups_of

SAME_SLIDES, LIKELY, OTHER_SLIDES = "same slides", "likely other slides", "other slides"
"""What a split of the images' own is: tiles of one slide may be on both sides, hardly, or can't."""


def own_split(
    images: LabelledImages, table: Path | None, test_fraction: float, seed: int, threads: int, ahead: int
) -> tuple[LabelledImages, LabelledImages, str]:
    """Train and test images of one folder, tiles of one patient or slide kept together where that can be, and how in
    words. ``table``: says which tiles are of one; ``threads`` read pixels, so many images ``ahead``."""
    pixels = map_ahead(image_or_fault, images.files, threads, ahead)
    groups = groups_of(images.files, images.folder, table, pixels)
    found = grouped_split(images, groups.of, test_fraction, seed)
    if found is None:
        train, test = map(images.subset, stratified_split(images, test_fraction, seed))
        how = f"{test_fraction:g} of every class held out, seed {seed}; by {groups.how} no class is on both sides"
        return train, test, f"{SAME_SLIDES}: {how}"
    train, test = (images.subset(part) for part in found)
    kind = OTHER_SLIDES if groups.known else LIKELY
    return train, test, f"{kind}: {len(test.files) / len(images.files):.2g} held out by {groups.how}, seed {seed}"


def stratified_split(images: LabelledImages, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of train and test images, the same share of every class in each, drawn from (seed, class) and nothing
    else.

    Raises `Fault` when a class has a single image.
    """
    train: list[int] = []
    test: list[int] = []
    for label, name in enumerate(images.classes):
        members = np.flatnonzero(images.labels == label)
        if len(members) < 2:
            raise Fault(
                f"class folder {images.folder / name} has a single image, which can't be split: add images, or give"
                " test="
            )
        members = rng(seed, "probe split", name).permutation(members)
        n_test = min(len(members) - 1, max(1, round(test_fraction * len(members))))
        test.extend(members[:n_test])
        train.extend(members[n_test:])
    return np.sort(train), np.sort(test)


def grouped_split(
    images: LabelledImages, groups: np.ndarray, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Positions of train and test images, no group on both sides, drawn from (seed) and nothing else.

    Of 50 draws of whole groups the one in which the share of every class is nearest to ``test_fraction``. None where no
    draw leaves every class on both sides.
    """
    classes = len(images.classes)
    table = np.zeros((groups.max() + 1, classes), dtype=np.int64)  # images of each group and class
    np.add.at(table, (groups, images.labels), 1)
    whole = table.sum(0)
    best, nearest = None, math.inf
    for attempt in range(50):
        order = rng(seed, "grouped split", attempt).permutation(len(table))
        taken = table[order].cumsum(0)
        count = 1 + int(np.abs(taken.sum(1) - test_fraction * whole.sum()).argmin())
        in_test = taken[count - 1]
        distance = np.abs(in_test / np.maximum(whole, 1) - test_fraction).sum()
        if (in_test > 0).all() and (in_test < whole).all() and distance < nearest:
            best, nearest = order[:count], distance
    if best is None:
        return None
    test = np.isin(groups, best)
    return np.flatnonzero(~test), np.flatnonzero(test)
