"""Measures against scikit-learn's and SciPy's, and against pairs counted one by one."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from data.keyed import rng
from pretrain.slide_probing.judge import Judge, passes_of
from pretrain.slide_probing.labels import LabelledSlides
from pretrain.slide_probing.linear import PENALTY, cox
from pretrain.slide_probing.measures import (
    auroc,
    balanced_accuracy,
    concordance,
    explained,
    quadratic_kappa,
    spearman,
)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_measures_of_classes_are_scikit_learns(classes: int, seed: int) -> None:
    draw = rng("measures", seed)
    truth = np.concatenate([np.arange(classes), draw.integers(classes, size=50)])
    shares = draw.dirichlet(np.ones(classes), len(truth)).round(1)  # rounded: with ties
    shares /= shares.sum(1, keepdims=True)
    score = shares[:, 1] if classes == 2 else shares
    assert auroc(truth, shares) == pytest.approx(metrics.roc_auc_score(truth, score, multi_class="ovr"))
    told = shares.argmax(1)
    assert balanced_accuracy(truth, shares) == pytest.approx(metrics.balanced_accuracy_score(truth, told))
    assert quadratic_kappa(truth, shares) == pytest.approx(metrics.cohen_kappa_score(truth, told, weights="quadratic"))


def test_measures_of_numbers_are_scipys_and_scikit_learns() -> None:
    draw = rng("numbers")
    truth = draw.normal(size=40).round(1)
    prediction = (truth + draw.normal(size=40)).round(1)
    assert spearman(truth, prediction) == pytest.approx(stats.spearmanr(truth, prediction).statistic)
    assert explained(truth, prediction) == pytest.approx(metrics.r2_score(truth, prediction))


def test_the_concordance_of_four_cases_is_that_found_by_hand() -> None:
    """Known who came first: of cases 0 and 1, 0 and 2, 0 and 3 (each right), 1 and 2 (one time, only 1 has the event;
    equal risks, a half), 1 and 3 (wrong). Of 2 and 3 it isn't: 2 was lost sight of before."""
    truth = np.array([[1, 1], [2, 1], [2, 0], [3, 0]], dtype=float)
    assert concordance(truth, np.array([3, 1, 1, 2])) == pytest.approx(3.5 / 5)


def cases_with_ties(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = rng("concordance", seed)
    return draw.integers(1, 12, 40), draw.integers(0, 2, 40), draw.integers(0, 6, 40)


@pytest.mark.parametrize("seed", range(4))
def test_the_concordance_counts_each_pair_of_which_it_is_known_who_came_first(seed: int) -> None:
    """Harrell's, as lifelines documents it: pair by pair."""
    time, event, risk = cases_with_ties(seed)
    right = known = 0.0
    for i in range(40):
        for j in range(i):
            first = min(i, j, key=lambda case: (time[case], not event[case]))
            last = i + j - first
            if event[first] and (time[first] < time[last] or not event[last]):
                known += 1
                right += 0.5 if risk[first] == risk[last] else float(risk[first] > risk[last])
    assert concordance(np.stack([time, event], 1).astype(float), risk) == pytest.approx(right / known)


@pytest.mark.parametrize("seed", range(4))
def test_the_concordance_is_lifelines(seed: int) -> None:
    lifelines = pytest.importorskip("lifelines.utils")
    time, event, risk = cases_with_ties(seed)
    expected = lifelines.concordance_index(time, -risk, event)  # there a higher score lives longer
    assert concordance(np.stack([time, event], 1).astype(float), risk) == pytest.approx(expected)


def test_proportional_hazards_have_no_slope_left() -> None:
    """By differences of the penalised partial likelihood written out with loops."""
    draw = rng("cox")
    x, time, event = draw.normal(size=(25, 3)), draw.integers(1, 9, 25), draw.integers(0, 2, 25)
    weights = cox(x, np.stack([time, event], 1).astype(float))

    def loss(b: np.ndarray) -> float:
        terms = [
            x[i] @ b - np.log(sum(np.exp(x[j] @ b) for j in range(25) if time[j] >= time[i]))
            for i in range(25)
            if event[i]
        ]
        return -sum(terms) / 25 + PENALTY / 2 * b @ b

    assert np.abs(weights).max() > 0.01
    for axis in np.eye(3) * 1e-5:
        assert (loss(weights + axis) - loss(weights - axis)) / 2e-5 == pytest.approx(0, abs=1e-4)


def labelled(n: int, patients: int | None = None) -> LabelledSlides:
    return LabelledSlides(
        bags=[[str(i)] for i in range(n)],
        names=[str(i) for i in range(n)],
        patients=[str(i % (patients or n)) for i in range(n)],
        kind="classes",
        values=np.arange(n) % 2,
        classes=["a", "b"],
        ordered=False,
        rounds=None,
        said=[],
    )


def test_a_bootstrap_draws_patients_with_all_their_cases() -> None:
    alone, of_three = Judge(labelled(12), [], 0), Judge(labelled(12, patients=3), [], 0)
    assert (alone.times.sum(1) == 12).all() and (of_three.times.sum(1) == 12).all()
    assert (of_three.times.reshape(-1, 4, 3) == of_three.times[:, None, :3]).all() and of_three.times.std() > 0


def test_the_folds_of_one_division_are_measured_together() -> None:
    folds = [np.arange(8)[i::4] for i in range(4)]
    rounds = [(np.setdiff1d(np.arange(8), one), one) for one in folds]
    assert passes_of([*rounds, *rounds[::-1]]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    judge = Judge(labelled(8), [(np.setdiff1d(np.arange(8), [i]), np.array([i])) for i in range(8)], 0)
    score = np.arange(8.0)
    found = judge(lambda _, who: np.stack([-score[who], score[who]], 1))  # each fold has one case alone
    assert found.figures["auroc"] == auroc(np.arange(8) % 2, np.stack([-score, score], 1))


def test_intervals_are_paired_and_hold_what_is_true_in_nearly_all_of_many_samples() -> None:
    inside = 0
    for seed in range(30):
        n, draw = 80, rng("samples", seed)
        truth = np.arange(n) % 2
        better, worse = (
            np.stack([-s, s], 1) for s in (truth * 1.0 + draw.normal(size=n), truth * 0.5 + draw.normal(size=n))
        )
        judge = Judge(labelled(n), [(np.arange(n), np.arange(n))], seed)
        judge.times = judge.times[:100]
        one, other = (judge(lambda _, who, given=given: given[who]) for given in (better, worse))
        row = judge.row(one, other)["auroc"]
        assert row["above_mean"] == pytest.approx(one.figures["auroc"] - other.figures["auroc"])
        low, high = row["interval"]
        inside += low <= stats.norm.cdf(1 / 2**0.5) <= high  # P(N(1, 1) > N(0, 1))
    assert 25 <= inside <= 30
    same = judge.row(one, one)["auroc"]
    assert same["above_mean_interval"] == [0.0, 0.0]
