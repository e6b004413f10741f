"""How good are the features? Nearest neighbours, a linear classifier and the effective rank, against honest baselines.

The question is always the same: frozen features of the images in a folder of class folders, a classifier fitted on the
training images, its accuracy on the test images. Two baselines are asked the same question, since in pathology colour
alone says a lot and an untrained network is not blind: a colour histogram, and the encoder's own architecture with
random weights.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.keyed import rng
from pretrain.objectives.figures import rankme

KNN_NEIGHBOURS = 20
TEMPERATURE = 0.07
INVERSE_REGULARISATION = 1.0
FEW_GROUPS = 10  # of test images, from which an error over groups is itself roughly known


@dataclass(frozen=True)
class Score:
    """What one kind of features reaches, with `standard_error` over the test images or their groups."""

    knn: float
    knn_se: float
    linear: float
    linear_se: float
    linear_converged: bool
    rankme: float
    knn_correct: np.ndarray
    linear_correct: np.ndarray


def score(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    groups: np.ndarray | None = None,
) -> Score:
    """Both classifiers' accuracy on the test features, and RankMe of the test features; ``groups`` (m,): which test
    images are of one slide, where that is known."""
    knn = knn_predict(train, train_labels, test, classes) == test_labels
    predicted, converged = linear_predict(train, train_labels, test)
    linear = predicted == test_labels
    return Score(
        knn=float(knn.mean()),
        knn_se=standard_error(knn, groups),
        linear=float(linear.mean()),
        linear_se=standard_error(linear, groups),
        linear_converged=converged,
        rankme=rankme(test),
        knn_correct=knn,
        linear_correct=linear,
    )


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


def knn_within(
    bank: np.ndarray, bank_labels: np.ndarray, asked: np.ndarray, asked_labels: np.ndarray, classes: int, seed: int
) -> float:
    """k-NN accuracy where tiles of one slide are on both sides: of as many images as are asked, drawn among all."""
    features, labels = np.concatenate([bank, asked]), np.concatenate([bank_labels, asked_labels])
    order = rng(seed, "same slides").permutation(len(labels))
    held, rest = order[: len(asked_labels)], order[len(asked_labels) :]
    return float((knn_predict(features[rest], labels[rest], features[held], classes) == labels[held]).mean())


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows divided by their length; a row of zeros stays zero."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(length, np.finfo(np.float32).tiny)


def linear_predict(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, bool]:
    """Labels (m,) that `logistic_regression` predicts, and whether its fit converged."""
    model, converged = logistic_regression(train, train_labels)
    return model.predict(test), converged


def logistic_regression(train: np.ndarray, train_labels: np.ndarray) -> tuple[Any, bool]:
    """Multinomial logistic regression on standardised features: scikit-learn's model, and whether the fit converged.

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
    return model, converged


def standard_error(values: np.ndarray, groups: np.ndarray | None = None) -> float:
    """That of the mean of n values, of single images or of what ``groups`` (n,) hold together, such as slides.

    Without groups, √(Σ (c − mean)²) / n: of right and wrong answers √(p (1 − p) / n). Images of one slide err together,
    so there are fewer independent ones than images: with G groups, √(G / (G − 1) Σ_g (Σ_{i in g} (c_i − mean))²) / n,
    the cluster-robust one (Liang and Zeger 1986). Few groups may agree by chance, so it is never less than that of
    images alone. A single group tells none, and counts as no groups.
    """
    rest = values.astype(np.float64) - values.mean()
    of_images = float(np.sqrt((rest**2).sum()) / len(rest))
    if groups is None or len(np.unique(groups)) < 2:
        return of_images
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=rest)
    return max(of_images, float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(rest)))


def errors_that_count(groups: int | None) -> float:
    """How many standard errors from nothing a difference tells with 95 %: two, and with few groups the quantile of t
    with one degree of freedom less than there are, 12.7 of two groups, 4.3 of three. Without groups, or with one, two.
    """
    from scipy.stats import t

    return 2.0 if groups is None or groups < 2 else max(2.0, float(t.ppf(0.975, groups - 1)))


def words_of_error(groups: np.ndarray | None, how: str) -> str:
    """What a standard error with these groups of test images is over; ``how``: what they are, in words."""
    count = 0 if groups is None else len(np.unique(groups))
    if count == 1:
        return f"over tiles of a single patient or slide ({how}), which tells nothing of any other; of a gain, paired"
    if count < 2:
        return "over tiles, which takes them for independent; of a gain, paired over tiles"
    few = (
        f", few to tell an error by: a gain counts from {errors_that_count(count):.1f} errors on"
        if count < FEW_GROUPS
        else ""
    )
    return (
        f"over {count} groups of test images, since those of one slide err together ({how}){few}; of a gain, paired over"
        " the groups"
    )


def gain(correct: np.ndarray, baseline: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """How much more accurate than a baseline on the same test images, and the standard error of that difference.

    The images are the same, so their luck cancels: the error is that of the per-image difference (−1, 0 or 1).
    """
    difference = correct.astype(np.float64) - baseline.astype(np.float64)
    if len(difference) < 2:
        return float(difference.mean()), math.nan
    return float(difference.mean()), standard_error(difference, groups)


def gains(ours: Score, baseline: Score, groups: np.ndarray | None = None) -> dict[str, dict[str, float]]:
    """How much more accurate than a baseline, with each classifier."""
    pairs = {
        "knn": (ours.knn_correct, baseline.knn_correct),
        "linear": (ours.linear_correct, baseline.linear_correct),
    }
    return {kind: dict(zip(("gain", "se"), gain(*pair, groups), strict=True)) for kind, pair in pairs.items()}
