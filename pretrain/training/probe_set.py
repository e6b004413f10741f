"""k-NN accuracy of the encoder in training on a small labelled set: one number, at every checkpoint, by all ranks
together.

Where the set is split here, tiles of one slide stay on one side (`pretrain.probing.slide_groups`). The accuracy with
tiles of the same slides on both sides, of a random split, is recorded beside it: a run that learns to recognise slides
gains in that one alone.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.keyed import rng
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.objectives.figures import rankme
from pretrain.probing.given_sides import told_of_sides
from pretrain.probing.grouping import Groups
from pretrain.probing.images import LabelledImages, read_class_folders, read_image
from pretrain.probing.likeness import THUMBNAIL_SIDE, by_looks, looks_of, thumbnail_of, with_copies
from pretrain.probing.scores import knn_predict, standard_error
from pretrain.probing.slide_names import by_name
from pretrain.probing.splits import best_group_split, group_split, of_one, stratified_split
from pretrain.run.across_ranks import gathered
from pretrain.training.fixed_images import BetweenBatches, FixedImages, agreed

Side = tuple[np.ndarray, np.ndarray]
"""Positions of the images of the bank, and of those that are asked."""


class ProbeSet:
    """Labelled images below ``folder``, at most ``most`` of them: class folders, or ``train/`` and ``test/`` that hold
    class folders. Of those the test images may be half of ``most``, and more where there are few to train on.

    Without ``test/``, each half of the images classifies the other, so that all of them are judged. Raises Fault as
    `read_class_folders` does.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.given: Side | None = None
        self.groups: np.ndarray | None = None  # of the images that are asked, where they are told
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            train, test = (read_class_folders(folder / part) for part in ("train", "test"))
            asked = min(len(test.files), max(most // 2, most - len(train.files)))
            train, test = fewer(train, max(1, most - asked)), fewer(test, max(1, asked))
            files, labels = [*train.files, *test.files], np.concatenate([train.labels, test.labels])
            self.set = LabelledImages(folder, train.classes, files, labels)
            self.given = np.arange(len(train.files)), np.arange(len(train.files), len(files))
            self.words, told = told_of_sides(train, test)
            self.groups = None if told is None else np.concatenate([np.zeros(len(train.files), int), told.of])
            mixed = rng(0, "same slides").permutation(len(files))
            self.within = [(mixed[: len(train.files)], mixed[len(train.files) :])]
        else:
            self.set = fewer(read_class_folders(folder), most)
            self.within = both_ways(stratified_split(self.set, 0.5, seed=0))

    def load(self, preprocessing: Preprocessing, rank: int, world_size: int, device: torch.device) -> str:
        """Read this rank's share of the images, and split them; returns in words how. Raises Fault for an image that
        can't be read."""
        files, named = self.set.files, None if self.given else by_name(self.set.files, self.set.folder)
        thumbnails: list[np.ndarray] = []

        def read(which: int) -> np.ndarray:
            pixels = read_image(files[which])
            thumbnails.append(np.zeros(THUMBNAIL_SIDE**2) if named is None else thumbnail_of(pixels))
            return pixels

        self.images = FixedImages(len(files), read, preprocessing, rank, world_size)
        if self.given is not None:
            self.across = [self.given]
            return self.words

        def of_all(own: list[np.ndarray], grouped: Callable[[np.ndarray], Groups]) -> Groups:
            """Groups of all images, of what this rank has of its own ones, as the first rank has them."""
            found = grouped(self.images.of_all(torch.from_numpy(np.stack(own)).to(device)).cpu().numpy())
            return replace(found, of=gathered(torch.from_numpy(found.of).to(device))[0].cpu().numpy())

        groupings = [] if named is None else [of_all(thumbnails, lambda every: with_copies(named, every))]
        if not (groupings and group_split(self.set, groupings[0], 0.5, seed=0).leaves_most):
            groupings.append(of_all([looks_of(read_image(files[which])) for which in self.images.own], by_looks))
        found = best_group_split(self.set, groupings, 0.5, seed=0)
        one = of_one(groupings)
        if found is None:
            self.across, self.groups = self.within, None
            return f"{one}same slides on both sides: by {groupings[-1].how} no class can be"
        self.across, self.groups = both_ways((found.train, found.test)), found.groups.of
        return f"{one}{found.kind}, split by {found.how}"

    def score(
        self, encoder: nn.Module, device: torch.device, between: BetweenBatches = lambda batches, _: batches
    ) -> dict[str, float]:
        """``probe_knn`` with its standard error, over slides where they are told (``probe_groups`` of them), and that over
        tiles (of the same tiles at another step); ``probe_knn_same_slides`` where it is another, and ``probe_rankme``; every rank calls it and gets the same numbers."""
        features = self.images.features(encoder, device, between).cpu().numpy()
        correct = self._correct(features, self.across)
        groups = None if self.groups is None else self.groups[np.concatenate([asked for _, asked in self.across])]
        figures = {
            "probe_knn": float(correct.mean()),
            "probe_knn_se": standard_error(correct, groups),
            "probe_knn_se_tiles": standard_error(correct),
            **({} if groups is None else {"probe_groups": float(len(np.unique(groups)))}),
            "probe_rankme": rankme(features),
        }
        if self.within is not self.across:
            figures["probe_knn_same_slides"] = float(self._correct(features, self.within).mean())
        return agreed(figures, device)

    def _correct(self, features: np.ndarray, sides: list[Side]) -> np.ndarray:
        labels, classes = self.set.labels, len(self.set.classes)
        return np.concatenate(
            [
                knn_predict(features[bank], labels[bank], features[asked], classes) == labels[asked]
                for bank, asked in sides
            ]
        )


def both_ways(side: Side) -> list[Side]:
    """Each of two halves asked with the other as the bank."""
    return [side, side[::-1]]


def fewer(images: LabelledImages, most: int) -> LabelledImages:
    """At most about ``most`` of the images, the same share of every class and at least two of each, always the same
    ones."""
    if len(images.files) <= most:
        return images
    chosen: list[int] = []
    for label, name in enumerate(images.classes):
        members = rng(0, "probe images", name).permutation(np.flatnonzero(images.labels == label))
        chosen.extend(members[: max(2, round(most * len(members) / len(images.files)))])
    return images.subset(np.sort(np.array(chosen)))
