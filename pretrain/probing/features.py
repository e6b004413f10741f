"""Features of labelled images by any extractors, each file read once; and those that need no network, a colour
histogram."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.ahead import map_ahead
from data.fault import Fault
from pretrain.probing.images import LabelledImages, image_or_fault
from pretrain.run.progress import say, track

HISTOGRAM_BINS = 32
UNREADABLE_NAMED = 10

Extractor = Callable[[Sequence[np.ndarray]], np.ndarray]
"""From n images, each uint8 (height, width, 3) and of any size, to features float (n, width)."""


@dataclass(frozen=True)
class Extracted:
    """Features of those images that could be read: by extractor name float32 (n, width), their labels (n,) and
    positions among all (n,), and the rest."""

    features: dict[str, np.ndarray]
    labels: np.ndarray
    positions: np.ndarray
    unreadable: list[str]


def extract(
    images: LabelledImages, extractors: dict[str, Extractor], batch: int, threads: int, label: str
) -> Extracted:
    """Run every extractor over every image, reading each file once.

    An image that can't be read is named (the first few; the rest are counted) and left out. Raises `Fault` when that
    leaves a class without images.
    """

    parts: dict[str, list[np.ndarray]] = {name: [] for name in extractors}
    positions: list[int] = []
    unreadable: list[str] = []
    pending: list[np.ndarray] = []

    def flush() -> None:
        if pending:
            for name, extractor in extractors.items():
                parts[name].append(np.asarray(extractor(pending), dtype=np.float32))
            pending.clear()

    results = map_ahead(image_or_fault, images.files, threads, ahead=2 * batch)
    for position, image in enumerate(track(results, len(images.files), label, "images")):
        if isinstance(image, Fault):
            unreadable.append(str(image))
            if len(unreadable) <= UNREADABLE_NAMED:
                say(f"left out: {image}")
            continue
        pending.append(image)
        positions.append(position)
        if len(pending) == batch:
            flush()
    flush()
    if unreadable:
        say(
            f"{label}: {len(unreadable)} of {len(images.files)} images of {images.folder} could not be read and were"
            " left out"
        )
    read = np.array(positions, dtype=np.int64)
    labels = images.labels[read]
    for index, name in enumerate(images.classes):
        if index not in labels:
            raise Fault(
                f"no image of class folder {images.folder / name} could be read: replace the images, or remove the"
                " folder"
            )
    return Extracted({name: np.concatenate(part) for name, part in parts.items()}, labels, read, unreadable)


def colour_histogram(images: Sequence[np.ndarray]) -> np.ndarray:
    """The share of an image's pixels in each of 32 bins of red, of green and of blue: n images → float32 (n, 96)."""
    width = 256 // HISTOGRAM_BINS
    return np.stack(
        [
            np.concatenate([np.bincount(image[..., c].ravel() // width, minlength=HISTOGRAM_BINS) for c in range(3)])
            / (image.shape[0] * image.shape[1])
            for image in images
        ]
    ).astype(np.float32)
