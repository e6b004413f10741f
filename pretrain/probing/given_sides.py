"""Training and test images that were both given: whether patients or slides are on both sides, as far as names tell."""

import numpy as np

from data.fault import Fault
from pretrain.probing.grouping import Groups
from pretrain.probing.images import LabelledImages, require_same_classes
from pretrain.probing.slide_names import by_name, by_path

ON_BOTH_SIDES = "are in train too"
"""What the words of a split have where it isn't by patients or slides."""


def told_of_sides(train: LabelledImages, test: LabelledImages) -> tuple[str, Groups | None]:
    """The split in words, and groups of the test images where names tell them.

    Raises Fault where both are one folder, and as `require_same_classes` does.
    """
    require_same_classes(train, test)
    if train.folder.resolve() == test.folder.resolve():
        raise Fault(
            f"{train.folder} and {test.folder} are the same images, and what was learned by heart would be asked: give"
            " other images to one of them, or train alone, which is split"
        )
    both = by_path([path.relative_to(images.folder) for images in (train, test) for path in images.files])
    if both is None:
        return "train and test given", by_name(test.files, test.folder)
    fitted, asked = both.of[: len(train.files)], both.of[len(train.files) :]
    words, shared = "train and test given", len(np.intersect1d(fitted, asked))
    if shared:
        words += f"; {shared} of the {len(np.unique(asked))} {both.kind} of test {ON_BOTH_SIDES} ({both.how})"
    return words, Groups(asked, both.how, both.known)
