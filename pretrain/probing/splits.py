"""Labelled images of one folder into those that a classifier is fitted on and those that it is asked."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.ahead import map_ahead
from data.fault import Fault
from data.keyed import rng
from pretrain.probing.grouping import Groups
from pretrain.probing.images import LabelledImages, image_or_fault
from pretrain.probing.slide_groups import groupings

SAME_SLIDES, LIKELY, OTHER_SLIDES, ALL_OF_ONE = "same slides", "likely other slides", "other slides", "all of one"
"""What a split of the images' own is: tiles of one slide may be on both sides, hardly, or can't; or there is but one
patient or slide."""
DRAWS = 50


@dataclass(frozen=True)
class GroupSplit:
    """Positions of train and test images, groups kept together but for the images of the classes ``inside``: those
    can't be on both sides with their groups whole, and are split at random."""

    train: np.ndarray
    test: np.ndarray
    inside: list[str]
    groups: Groups
    classes: int

    @property
    def leaves_most(self) -> bool:
        """Whether more than half of the classes are on both sides with their groups whole."""
        return 2 * len(self.inside) < self.classes

    @property
    def kind(self) -> str:
        """What the split is, and of which classes it isn't."""
        kind = OTHER_SLIDES if self.groups.known else LIKELY
        return f"{kind} but for {_classes(self.inside)}" if self.inside else kind

    @property
    def how(self) -> str:
        """By which groups, and what couldn't be kept together."""
        if not self.inside:
            return self.groups.how
        return (
            f"{self.groups.how}; {_classes(self.inside)} can't be on both sides by these, and"
            f" {'is' if len(self.inside) == 1 else 'are'} split at random, which flatters"
            f" {'its' if len(self.inside) == 1 else 'their'} accuracy"
        )


def _classes(names: list[str]) -> str:
    return f"class{'es' * (len(names) > 1)} {', '.join(names)}"


@dataclass(frozen=True)
class OwnSplit:
    """Train and test images of one folder, how in words, and the groups of the test images, None where none were
    found."""

    train: LabelledImages
    test: LabelledImages
    words: str
    test_groups: Groups | None


def own_split(
    images: LabelledImages, table: Path | None, test_fraction: float, seed: int, threads: int, ahead: int
) -> OwnSplit:
    """Train and test images of one folder, tiles of one patient or slide kept together where that can be. ``table``:
    says which tiles are of one; ``threads`` read pixels, so many images ``ahead``."""
    tried: list[Groups] = []

    def pixels() -> Iterable[np.ndarray | Fault]:
        return map_ahead(image_or_fault, images.files, threads, ahead)

    def noted() -> Iterable[Groups]:
        for groups in groupings(images.files, images.folder, table, pixels):
            tried.append(groups)
            yield groups

    found = best_group_split(images, noted(), test_fraction, seed)
    one = of_one(tried)
    if found is None:
        train, test = map(images.subset, stratified_split(images, test_fraction, seed))
        how = f"{test_fraction:g} of every class held out, seed {seed}; by {tried[-1].how} no class is on both sides"
        return OwnSplit(train, test, f"{one or f'{SAME_SLIDES}: '}{how}", None)
    train, test = images.subset(found.train), images.subset(found.test)
    share = len(test.files) / len(images.files)
    return OwnSplit(
        train,
        test,
        f"{one or f'{found.kind}: '}{share:.2g} held out by {found.how}, seed {seed}",
        Groups(found.groups.of[found.test], found.groups.how, found.groups.known),
    )


def of_one(tried: list[Groups]) -> str:
    """How the words of a split begin where all images are known to be of one patient or slide; else empty."""
    return next((f"{ALL_OF_ONE} {one.kind.removesuffix('s')} ({one.how}): " for one in tried if one.all_of_one), "")


def stratified_split(images: LabelledImages, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of train and test images, the same share of every class in each, drawn from (seed, class) and nothing
    else.

    Raises `Fault` when a class has a single image.
    """
    train: list[int] = []
    test: list[int] = []
    for label, name in enumerate(images.classes):
        kept, held = _split_class(images, np.flatnonzero(images.labels == label), name, test_fraction, seed)
        train.extend(kept)
        test.extend(held)
    return np.sort(train), np.sort(test)


def _split_class(
    images: LabelledImages, members: np.ndarray, name: str, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a class's train and test images, drawn at random."""
    if len(members) < 2:
        raise Fault(
            f"class folder {images.folder / name} has a single image, which can't be split: add images, or give test="
        )
    members = rng(seed, "probe split", name).permutation(members)
    n_test = min(len(members) - 1, max(1, round(test_fraction * len(members))))
    return members[n_test:], members[:n_test]


def best_group_split(
    images: LabelledImages, groupings: Iterable[Groups], test_fraction: float, seed: int
) -> GroupSplit | None:
    """The split by the first groups that leave more than half of the classes on both sides, or else by those that leave
    most of them so; None where none leaves any."""
    best: GroupSplit | None = None
    for groups in groupings:
        found = group_split(images, groups, test_fraction, seed)
        if best is None or len(found.inside) < len(best.inside):
            best = found
        if found.leaves_most:
            return found
    return best if best is not None and len(best.inside) < len(images.classes) else None


def group_split(images: LabelledImages, groups: Groups, test_fraction: float, seed: int) -> GroupSplit:
    """No group on both sides, but for classes that couldn't be on both, which are split at random. Drawn from (seed)
    and nothing else.

    Raises `Fault` when a class has a single image.
    """
    test, missing = _drawn(images, groups.of, test_fraction, seed)
    inside = [images.classes[label] for label in missing]
    for label in missing:
        members = np.flatnonzero(images.labels == label)
        test[members] = False
        test[_split_class(images, members, images.classes[label], test_fraction, seed)[1]] = True
    return GroupSplit(np.flatnonzero(~test), np.flatnonzero(test), inside, groups, len(images.classes))


def grouped_split(
    images: LabelledImages, groups: np.ndarray, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Positions of train and test images, no group on both sides, drawn from (seed) and nothing else; None where that
    leaves no class out of train or test."""
    test, missing = _drawn(images, groups, test_fraction, seed)
    return None if missing else (np.flatnonzero(~test), np.flatnonzero(test))


def _drawn(images: LabelledImages, groups: np.ndarray, test_fraction: float, seed: int) -> tuple[np.ndarray, list[int]]:
    """Whether each image is held out, no group on both sides, and the classes that aren't on both.

    Of 50 orders of the groups and every number of their first ones, what leaves most classes on both sides, and of
    those the one in which the share of every class is nearest to ``test_fraction``.
    """
    table = np.zeros((groups.max() + 1, len(images.classes)), dtype=np.int64)  # images of each group and class
    np.add.at(table, (groups, images.labels), 1)
    whole = table.sum(0)
    best, judged = np.empty(0, dtype=np.int64), (len(whole) + 1, 0.0)
    for attempt in range(DRAWS):
        order = rng(seed, "grouped split", attempt).permutation(len(table))
        taken = table[order].cumsum(0)
        absent = ((taken == 0) | (taken == whole)).sum(1)
        distance = np.abs(taken / np.maximum(whole, 1) - test_fraction).sum(1)
        first = np.lexsort((distance, absent))[0]
        if (found := (int(absent[first]), float(distance[first]))) < judged:
            best, judged = order[: first + 1], found
    in_test = table[best].sum(0)
    return np.isin(groups, best), np.flatnonzero((in_test == 0) | (in_test == whole)).tolist()
