"""Random numbers that depend on their key alone."""

import subprocess
import sys
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.keyed import drawn, rng

PART = st.one_of(
    st.integers(-(2**40), 2**40), st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), max_size=8)
)
KEY = st.lists(PART, min_size=1, max_size=4).map(tuple)


@given(KEY)
def test_the_same_key_gives_the_same_numbers(key: tuple[int | str, ...]) -> None:
    assert np.array_equal(rng(*key).random(4), rng(*key).random(4))


@given(KEY, KEY)
def test_different_keys_give_different_numbers(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    if [(type(part), part) for part in one] != [(type(part), part) for part in other]:
        assert not np.array_equal(rng(*one).random(4), rng(*other).random(4))


def test_parts_are_separated_and_typed() -> None:
    keys: list[tuple[int | str, ...]] = [
        (1, 23),
        (12, 3),
        (123,),
        ("1", 23),
        (1, "23"),
        ("123",),
        ("1", "23"),
        ("12", "3"),
    ]
    assert len({float(rng(*key).random()) for key in keys}) == len(keys)


def test_a_numpy_integer_is_the_integer_it_holds() -> None:
    assert rng(3, "a", np.int64(5)).random() == rng(3, "a", 5).random()  # type: ignore[arg-type]


def test_another_process_draws_the_same_numbers() -> None:
    program = "from data.keyed import rng; print(repr(float(rng(7, 'crops', 11).random())))"
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(elsewhere.stdout) == float(rng(7, "crops", 11).random())


def test_numbers_of_neighbouring_keys_are_uncorrelated() -> None:
    draws = np.stack([rng(0, "crops", sample).random(2000) for sample in range(8)])
    between = np.corrcoef(draws)[~np.eye(8, dtype=bool)]
    assert np.abs(between).max() < 5 / np.sqrt(2000)


def test_a_few_of_a_billion_are_drawn_in_memory_of_a_few() -> None:
    tracemalloc.start()
    few = drawn(10**9, 64, 0, "tiles")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(few)) == 64 and (np.diff(few) > 0).all() and few[0] >= 0 and few[-1] < 10**9 and peak < 2**20
    assert np.array_equal(few, drawn(10**9, 64, 0, "tiles")) and not np.array_equal(few, drawn(10**9, 64, 1, "tiles"))


@given(st.integers(0, 60), st.integers(0, 80))
def test_what_is_drawn_is_distinct_and_all_where_there_is_no_more(population: int, count: int) -> None:
    found = drawn(population, count, "some").tolist()
    assert len(set(found)) == len(found) == min(population, count) and set(found) <= set(range(population))


def test_each_is_as_likely_to_be_drawn() -> None:
    counts = np.bincount(np.concatenate([drawn(20, 5, seed, "even") for seed in range(4000)]), minlength=20)
    assert abs(counts - 1000).max() < 5 * 1000**0.5
