"""What a prediction is worth: one number of truth and prediction, as scikit-learn and lifelines have it."""

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

Measure = Callable[[np.ndarray, np.ndarray], float]
"""Truth ``(n,)`` or ``(n, 2)`` and prediction ``(n,)`` or ``(n, classes)`` → a number, NaN where it can't be told."""


def auroc(truth: np.ndarray, shares: np.ndarray) -> float:
    """Area under the ROC curve, of more than two classes the mean over the classes each against the rest; ``shares``
    (n, classes).

    By ranks (Mann-Whitney): ``(Σ ranks of the n₁ positives − n₁ (n₁ + 1) / 2) / (n₁ n₀)``; equal values count half.
    """
    classes = shares.shape[1]
    of_each = [_area(truth == one, shares[:, one]) for one in ([1] if classes == 2 else range(classes))]
    return float(np.mean(of_each))


def _area(positive: np.ndarray, score: np.ndarray) -> float:
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return np.nan
    return (rankdata(score)[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros)


def balanced_accuracy(truth: np.ndarray, shares: np.ndarray) -> float:
    """Mean over the classes that there are of the share that was told right."""
    right = shares.argmax(axis=1) == truth
    return float(np.mean([right[truth == one].mean() for one in np.unique(truth)]))


def quadratic_kappa(truth: np.ndarray, shares: np.ndarray) -> float:
    """Cohen's κ with weights ``(i − j)²``, for classes in an order: ``1 − Σ w O / Σ w E`` of confusions O and those by
    chance, E."""
    classes = shares.shape[1]
    found = np.zeros((classes, classes))
    np.add.at(found, (truth, shares.argmax(axis=1)), 1)
    weights = np.square(np.arange(classes)[:, None] - np.arange(classes))
    chance = np.outer(found.sum(1), found.sum(0)) / len(truth)
    by_chance = (weights * chance).sum()
    return float(1 - (weights * found).sum() / by_chance) if by_chance else np.nan


def spearman(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Correlation of the ranks."""
    one, other = rankdata(truth), rankdata(prediction)
    if not one.std() or not other.std():
        return np.nan
    return float(np.corrcoef(one, other)[0, 1])


def explained(truth: np.ndarray, prediction: np.ndarray) -> float:
    """R²: ``1 − Σ (truth − prediction)² / Σ (truth − mean)²``."""
    spread = np.square(truth - truth.mean()).sum()
    return float(1 - np.square(truth - prediction).sum() / spread) if spread else np.nan


def concordance(truth: np.ndarray, risk: np.ndarray) -> float:
    """Harrell's c: of the pairs of which it is known who came first, the share in which the higher risk did; equal
    risks count half. ``truth`` (n, 2): time and event.

    Known are pairs of which the earlier has the event; with equal times, of which one has it and the other hasn't.
    """
    time, event = truth[:, 0], truth[:, 1] > 0
    sooner = time[:, None] < time
    known = event[:, None] & (sooner | ((time[:, None] == time) & ~event))
    pairs = known.sum()
    if not pairs:
        return np.nan
    higher = (risk[:, None] > risk) + 0.5 * (risk[:, None] == risk)
    return float((known * higher).sum() / pairs)


MEASURES: dict[str, dict[str, Measure]] = {
    "classes": {"auroc": auroc, "balanced_accuracy": balanced_accuracy},
    "grades": {"auroc": auroc, "balanced_accuracy": balanced_accuracy, "quadratic_kappa": quadratic_kappa},
    "number": {"spearman": spearman, "r2": explained},
    "survival": {"c_index": concordance},
}
"""By kind of label; the first is the one that rows are compared by."""


def differ(kind: str, truth: np.ndarray) -> bool:
    """Whether there is anything to tell apart in the ``truth`` of some cases: two values, or, for survival, a pair of
    which it is known who came first."""
    if kind == "survival":
        return bool(np.isfinite(concordance(truth, np.zeros(len(truth)))))
    return len(np.unique(truth)) > 1
