"""Schedules: warm-up, half cosine, ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.objectives.schedules import cosine


def test_values_of_a_short_schedule_done_by_hand() -> None:
    found = [cosine(step, peak=1.0, final=0.0, total=7, warmup=3) for step in range(9)]
    expected = [0, 0.5, 1, 1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4)), 0, 0]
    assert found == pytest.approx(expected, abs=1e-12)


def test_frozen_steps_are_zero_and_shift_the_warm_up() -> None:
    assert [cosine(step, peak=1.0, final=0.0, total=20, warmup=3, frozen=2) for step in range(5)] == [0, 0, 0, 0.5, 1]


@given(st.integers(0, 300), st.integers(1, 200), st.integers(0, 50), st.floats(0, 10), st.floats(0, 10))
def test_a_value_never_leaves_the_range_of_its_ends(
    step: int, total: int, warmup: int, peak: float, final: float
) -> None:
    value = cosine(step, peak=peak, final=final, total=total, warmup=warmup)
    assert min(0.0, peak, final) - 1e-9 <= value <= max(peak, final) + 1e-9


@given(st.integers(0, 100), st.floats(0.01, 1))
def test_equal_ends_are_a_constant(step: int, value: float) -> None:
    assert cosine(step, peak=value, final=value, total=100) == pytest.approx(value)


def test_one_step_of_warm_up_starts_at_its_start() -> None:
    assert cosine(0, peak=1.0, final=0.0, total=10, warmup=1) == 0.0
    assert cosine(1, peak=1.0, final=0.0, total=10, warmup=1) == 1.0
