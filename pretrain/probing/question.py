"""What a probe asks: which images teach, which are asked, and which of these are of one slide."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pretrain.probing.given_sides import told_of_sides
from pretrain.probing.grouping import Groups
from pretrain.probing.images import LabelledImages, read_class_folders
from pretrain.probing.splits import own_split


@dataclass(frozen=True)
class Question:
    """Training and test images, how they were split in words, and the slides or patients of the test images where they
    are told; ``given``: both were the user's."""

    train: LabelledImages
    test: LabelledImages
    split: str
    groups: Groups | None
    given: bool

    def hash(self, encoder: str, seed: int) -> str:
        """Of what an encoder of that hash is asked: every image's class, name and size in bytes."""
        told_apart = [self.split] + ([] if self.groups is None else [self.groups.how, str(self.groups.of.tolist())])
        digest = hashlib.sha256("\n".join([encoder, str(seed), *told_apart]).encode())
        for images in (self.train, self.test):
            for path, label in zip(images.files, images.labels, strict=True):
                digest.update(f"{images.classes[label]} {path.name} {path.stat().st_size}\n".encode())
            digest.update(b"--\n")
        return digest.hexdigest()[:16]


def asked_of(
    train: Path, test: Path | None, table: Path | None, test_fraction: float, seed: int, threads: int, ahead: int
) -> Question:
    """The question of class folders; without ``test`` a part of ``train`` is held out: see `own_split`. Raises Fault as
    it, `told_of_sides` and `read_class_folders` do."""
    images = read_class_folders(train)
    if test is None:
        own = own_split(images, table, test_fraction, seed, threads, ahead)
        return Question(own.train, own.test, own.words, own.test_groups, given=False)
    others = read_class_folders(test)
    words, groups = told_of_sides(images, others)
    return Question(images, others, words, groups, given=True)
