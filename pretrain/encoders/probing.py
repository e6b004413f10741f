"""How good are the features? Nearest neighbours, a linear classifier and the effective rank, against honest baselines.

The question is always the same: frozen features of the images in a folder of class folders, a classifier fitted on the
training images, its accuracy on the test images. Two baselines are asked the same question, since in pathology colour
alone says a lot and an untrained network is not blind: a colour histogram, and the encoder's own architecture with
random weights.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.ahead import map_ahead
from data.fault import Fault
from data.keyed import rng
from pretrain.objectives.figures import rankme
from pretrain.run.progress import say, track

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
KNN_NEIGHBOURS = 20
TEMPERATURE = 0.07
INVERSE_REGULARISATION = 1.0
HISTOGRAM_BINS = 32
UNREADABLE_NAMED = 10

Extractor = Callable[[Sequence[np.ndarray]], np.ndarray]
"""From n images, each uint8 (height, width, 3) and of any size, to features float (n, width)."""


@dataclass(frozen=True)
class LabelledImages:
    """Image files and their classes: ``labels[i]`` is the index in ``classes`` of the folder that ``files[i]`` is in."""

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
                f"class folder {images.folder / name} has a single image, which can't be split: add images, or give test="
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


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 (height, width, 3).

    Raises `Fault` when it can't be decoded, or has more than 8 bits a channel (converting those clips them in silence).
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise Fault(f"{path} has more than 8 bits a channel: convert it to 8-bit RGB")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise Fault(f"{path} can't be read as an image ({error})") from error


def image_or_fault(path: Path) -> np.ndarray | Fault:
    """As `read_image`, with the Fault in place of an image that can't be had."""
    try:
        return read_image(path)
    except Fault as fault:
        return fault


@dataclass(frozen=True)
class Extracted:
    """Features of those images that could be read: by extractor name float32 (n, width), their labels (n,), and the
    rest."""

    features: dict[str, np.ndarray]
    labels: np.ndarray
    unreadable: list[str]


def extract(
    images: LabelledImages, extractors: dict[str, Extractor], batch: int, threads: int, label: str
) -> Extracted:
    """Run every extractor over every image, reading each file once.

    An image that can't be read is named (the first few; the rest are counted) and left out. Raises `Fault` when that
    leaves a class without images.
    """

    parts: dict[str, list[np.ndarray]] = {name: [] for name in extractors}
    labels: list[int] = []
    unreadable: list[str] = []
    pending: list[np.ndarray] = []

    def flush() -> None:
        if pending:
            for name, extractor in extractors.items():
                parts[name].append(np.asarray(extractor(pending), dtype=np.float32))
            pending.clear()

    results = map_ahead(image_or_fault, images.files, threads, ahead=2 * batch)
    for image, klass in zip(track(results, len(images.files), label, "images"), images.labels, strict=True):
        if isinstance(image, Fault):
            unreadable.append(str(image))
            if len(unreadable) <= UNREADABLE_NAMED:
                say(f"left out: {image}")
            continue
        pending.append(image)
        labels.append(int(klass))
        if len(pending) == batch:
            flush()
    flush()
    if unreadable:
        say(
            f"{label}: {len(unreadable)} of {len(images.files)} images of {images.folder} could not be read and were left out"
        )
    for index, name in enumerate(images.classes):
        if index not in labels:
            raise Fault(
                f"no image of class folder {images.folder / name} could be read: replace the images, or remove the folder"
            )
    return Extracted({name: np.concatenate(part) for name, part in parts.items()}, np.array(labels), unreadable)


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


def knn_predict(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    classes: int,
    k: int = KNN_NEIGHBOURS,
    chunk: int = 1024,
    itself: bool = True,
) -> np.ndarray:
    """Weighted nearest neighbours as DINO evaluates them (Caron 2021, section 4.1; weights of Wu 2018, equation 7).

    The ``k`` training images of highest cosine similarity s each vote exp(s / 0.07) for their class. Takes features
    (n, width), labels (n,) and features (m, width); returns predicted labels (m,). With fewer than ``k`` training
    images all of them vote. Where both are the same images, ``itself=False`` leaves each one's own vote out.
    """
    train, test = unit_rows(train), unit_rows(test)
    k = min(k, len(train) if itself else len(train) - 1)
    predicted = np.empty(len(test), dtype=np.int64)
    for start in range(0, len(test), chunk):
        similarity = test[start : start + chunk] @ train.T
        if not itself:
            similarity[np.arange(len(similarity)), start + np.arange(len(similarity))] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        strength = np.take_along_axis(similarity, nearest, axis=1)
        # Taking off the largest first changes no ratio of votes and keeps exp in range.
        vote = np.exp((strength - strength.max(axis=1, keepdims=True)) / TEMPERATURE)
        votes = np.zeros((len(similarity), classes))
        np.add.at(votes, (np.arange(len(similarity))[:, None], train_labels[nearest]), vote)
        predicted[start : start + chunk] = votes.argmax(axis=1)
    return predicted


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows divided by their length; a row of zeros stays zero."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(length, np.finfo(np.float32).tiny)


def linear_predict(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, bool]:
    """Multinomial logistic regression on standardised features: predicted labels (m,), and whether the fit converged.

    Each feature is centred and scaled by the training images; L2 penalty with C = 1, L-BFGS, up to 1000 iterations.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train, train_labels)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return model.predict(test), converged


@dataclass(frozen=True)
class Score:
    """What one kind of features reaches. Standard errors are binomial, over the test images."""

    knn: float
    knn_se: float
    linear: float
    linear_se: float
    linear_converged: bool
    rankme: float
    knn_correct: np.ndarray
    linear_correct: np.ndarray


def score(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, classes: int
) -> Score:
    """Both classifiers' accuracy on the test features, and RankMe of the test features."""
    knn = knn_predict(train, train_labels, test, classes) == test_labels
    predicted, converged = linear_predict(train, train_labels, test)
    linear = predicted == test_labels
    return Score(
        knn=float(knn.mean()),
        knn_se=standard_error(knn),
        linear=float(linear.mean()),
        linear_se=standard_error(linear),
        linear_converged=converged,
        rankme=rankme(test),
        knn_correct=knn,
        linear_correct=linear,
    )


def standard_error(correct: np.ndarray) -> float:
    """√(p (1 − p) / n), of the accuracy p on n test images."""
    p = float(correct.mean())
    return math.sqrt(p * (1 - p) / len(correct))


def gain(correct: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """How much more accurate than a baseline on the same test images, and the standard error of that difference.

    The images are the same, so their luck cancels: the error is that of the per-image difference (−1, 0 or 1).
    """
    difference = correct.astype(np.float64) - baseline.astype(np.float64)
    if len(difference) < 2:
        return float(difference.mean()), math.nan
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))
