"""Whose turn it is in a mixture: exact shares, found at any position without counting up to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.fault import Fault
from data.tiles.shares import PartShares

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def counted(members: np.ndarray, size: int) -> list[int]:
    return np.bincount(members, minlength=size).tolist()


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 500))
def test_a_count_without_counting_is_the_count(weights: list[int], position: int) -> None:
    shares = PartShares(weights)
    members, before = shares.members(np.arange(position))
    assert shares.counts(position) == counted(members, len(weights))
    for member in range(len(weights)):  # a member's draws are numbered 0, 1, 2, …
        assert before[members == member].tolist() == list(range(int((members == member).sum())))


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_after_a_period_the_shares_are_exact_and_the_sequence_repeats(weights: list[int]) -> None:
    shares = PartShares(weights)
    members, _ = shares.members(np.arange(2 * shares.period))
    assert counted(members[: shares.period], len(weights)) == shares.whole
    assert np.array_equal(members[: shares.period], members[shares.period :])
    assert [w * sum(weights) for w in shares.whole] == [w * shares.period for w in weights]


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 10**12))
def test_any_run_of_draws_holds_the_shares_to_within_the_number_of_members(weights: list[int], start: int) -> None:
    shares, length = PartShares(weights), 64
    members, _ = shares.members(np.arange(start, start + length))
    for member, count in enumerate(counted(members, len(weights))):
        assert abs(count - length * weights[member] / sum(weights)) < len(weights) + 1
        assert abs(shares.counts(start)[member] - start * weights[member] / sum(weights)) < len(weights)


def test_by_hand() -> None:
    assert PartShares([2, 1]).members(np.arange(6))[0].tolist() == [1, 0, 0, 1, 0, 0]  # ⌊n · 2/3⌋: 0 0 1 2 2 3 4
    assert PartShares([0.2, 0.2, 0.4, 0.2]).whole == [
        1,
        1,
        2,
        1,
    ]  # decimals are what they say, not their nearest doubles


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(Fault, match="positive"):
        PartShares(weights)


def test_weights_too_fine_for_exact_counting_are_refused() -> None:
    with pytest.raises(Fault, match="round them"):
        PartShares([1, 1e-9])
