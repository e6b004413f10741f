"""Labelled images: folders of one folder per class, and their pixels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.fault import Fault
from data.images import load_whole_range

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}


@dataclass(frozen=True)
class LabelledImages:
    """Image files and their classes: ``labels[i]`` is the index in ``classes`` of the folder that ``files[i]`` is
    in."""

    folder: Path
    classes: list[str]
    files: list[Path]
    labels: np.ndarray

    def subset(self, chosen: np.ndarray) -> "LabelledImages":
        """The images at the positions ``chosen``."""
        return LabelledImages(self.folder, self.classes, [self.files[i] for i in chosen], self.labels[chosen])


def read_class_folders(folder: Path) -> LabelledImages:
    """Every jpg, png and tif below ``folder/<class>/``, sorted, so that the order is the same on every machine.

    Raises `Fault` when there is no such folder, when it has fewer than two class folders, or when one of them is empty.
    """
    if not folder.is_dir():
        raise Fault(f"{folder} is not a folder; give a folder that holds one folder of images per class")
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if len(classes) < 2:
        raise Fault(
            f"{folder} holds {len(classes)} class folder{'s' * (len(classes) != 1)}, and telling classes apart "
            "takes at least two: give a folder that holds one folder of images per class"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if broken := next((path for path in images if path.is_symlink() and not path.exists()), None):
            raise Fault(f"{broken} is a link to {broken.readlink()}, which isn't there: mend the link, or remove it")
        if not images:
            raise Fault(f"class folder {folder / name} has no jpg, png or tif image: add some, or remove the folder")
        files.extend(images)
        labels.extend([label] * len(images))
    return LabelledImages(folder, classes, files, np.array(labels, dtype=np.int64))


def require_same_classes(train: LabelledImages, test: LabelledImages) -> None:
    """Raises `Fault` when the two folders don't have the same class folders."""
    for one, other in ((train, test), (test, train)):
        missing = sorted(set(one.classes) - set(other.classes))
        if missing:
            raise Fault(
                f"{other.folder} has no class folder {', '.join(missing)}, which {one.folder} has: "
                "train and test must have the same class folders"
            )


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 (height, width, 3).

    Raises `Fault` when it can't be decoded, or has more than 8 bits of grey (converting those clips them in silence), or colours of 16 bits that are nearly black as
    they are.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise Fault(f"{path} has more than 8 bits a channel: convert it to 8-bit RGB")
            load_whole_range(image)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise Fault(f"{path} can't be read as an image ({error})") from error


def image_or_fault(path: Path) -> np.ndarray | Fault:
    """As `read_image`, with the Fault in place of an image that can't be had."""
    try:
        return read_image(path)
    except Fault as fault:
        return fault
