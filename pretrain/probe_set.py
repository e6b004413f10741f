"""k-NN accuracy of the encoder in training on a small labelled set: one number, at every checkpoint, by all ranks together.

The images are read once, at the start, each by one rank. Every rank then runs its share through the sharded encoder, in the
same number of passes as all the others, since each pass gathers parameters from all of them.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.keyed import rng
from pretrain.across_ranks import gathered
from pretrain.encoders import Preprocessing
from pretrain.probing import (
    LabelledImages,
    knn_predict,
    rankme,
    read_class_folders,
    read_image,
    require_same_classes,
    standard_error,
    stratified_split,
)
from pretrain.watching import class_tokens

BATCH = 64  # images a pass
Walk = Callable[[Iterable[Tensor], int], Iterable[Tensor]]


class ProbeSet:
    """Labelled images below ``folder``, at most ``most`` of them: class folders, or ``train/`` and ``test/`` that hold class folders.

    Without ``test/``, each half of the images classifies the other, so that all of them are judged. Raises Fault as
    `read_class_folders` does.
    """

    def __init__(self, folder: Path, most: int) -> None:
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            train, test = (read_class_folders(folder / part) for part in ("train", "test"))
            require_same_classes(train, test)
            share = most / (len(train.files) + len(test.files))
            train, test = (fewer(part, max(1, round(share * len(part.files)))) for part in (train, test))
            self.both_ways = False
        else:
            train, test = stratified_split(fewer(read_class_folders(folder), most), 0.5, seed=0)
            self.both_ways = True
        self.classes, self.training = len(train.classes), len(train.files)
        self.files, self.labels = [*train.files, *test.files], np.concatenate([train.labels, test.labels])

    def load(self, preprocessing: Preprocessing, rank: int, world_size: int) -> None:
        """Read this rank's share of the images, scaled to what the network gets. Raises Fault for an image that can't be read."""
        self.preprocessing, self.share = preprocessing, -(-len(self.files) // world_size)
        # The last images are read by several ranks where they don't divide: equal shares are equal numbers of passes.
        own = [min(i * world_size + rank, len(self.files) - 1) for i in range(self.share)]
        plain = Preprocessing(
            preprocessing.image_size,
            preprocessing.resize_to,
            (0.0, 0.0, 0.0),
            (1.0, 1.0, 1.0),
            preprocessing.interpolation,
        )
        images = [plain(torch.from_numpy(np.array(read_image(self.files[i]))).unsqueeze(0)) for i in own]
        self.images = (torch.cat(images) * 255).round().byte()  # (share, 3, S, S)

    def features(self, encoder: nn.Module, device: torch.device, walk: Walk = lambda batches, _: batches) -> Tensor:
        """Features ``(images, width)`` of all images, on every rank; ``walk`` hands on the batches, told how many there are."""
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        parts = self.images.split(BATCH)
        own = [class_tokens(encoder, (part.to(device).float() / 255 - mean) / std) for part in walk(parts, len(parts))]
        return gathered(torch.cat(own)).transpose(0, 1).flatten(0, 1)[: len(self.files)]

    def score(
        self, encoder: nn.Module, device: torch.device, walk: Walk = lambda batches, _: batches
    ) -> dict[str, float]:
        """``probe_knn`` with its binomial standard error, and ``probe_rankme``; every rank calls it and gets the same numbers."""
        features = self.features(encoder, device, walk).cpu().numpy()
        cut, labels = self.training, self.labels
        sides = [(slice(0, cut), slice(cut, None))] + ([(slice(cut, None), slice(0, cut))] if self.both_ways else [])
        correct = np.concatenate(
            [
                knn_predict(features[bank], labels[bank], features[asked], self.classes) == labels[asked]
                for bank, asked in sides
            ]
        )
        figures = {
            "probe_knn": float(correct.mean()),
            "probe_knn_se": standard_error(correct),
            "probe_rankme": rankme(features),
        }
        # Ranks of different processors may round differently, and a run must not end on one of them alone.
        first = gathered(torch.tensor(list(figures.values()), dtype=torch.float64, device=device))[0]
        return dict(zip(figures, first.tolist(), strict=True))


def fewer(images: LabelledImages, most: int) -> LabelledImages:
    """At most about ``most`` of the images, the same share of every class and at least two of each, always the same ones."""
    if len(images.files) <= most:
        return images
    chosen: list[int] = []
    for label, name in enumerate(images.classes):
        members = rng(0, "probe images", name).permutation(np.flatnonzero(images.labels == label))
        chosen.extend(members[: max(2, round(most * len(members) / len(images.files)))])
    return images.subset(np.sort(np.array(chosen)))
