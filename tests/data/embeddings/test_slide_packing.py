"""Batches of sequences: what they hold depends on the seed and the step, and never on processes or history."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.embeddings.packing import Packing
from data.fault import Fault
from data.keyed import rng


def lengths(n: int = 50) -> np.ndarray:
    return (rng("lengths").pareto(1.2, n) * 20 + 4).astype(int)


def packing(tokens: int | None = 800, seed: int = 0, lanes: int = 4, sizes: np.ndarray | None = None) -> Packing:
    return Packing(lengths() if sizes is None else sizes, batch_size=40, batch_tokens=tokens, lanes=lanes, seed=seed)


def by_hand(found: Packing, lanes: int) -> list[list[int]]:
    """The lanes one after another, filled a sequence at a time."""
    filled, position = [], 0
    for _ in range(lanes):
        lane, tiles = [], 0
        while True:
            size = int(found.sizes[found.sequence_at(position)])
            if lane and (tiles + size > found.room or len(lane) == found.most):
                break
            lane.append(position)
            tiles, position = tiles + size, position + 1
        filled.append(lane)
    return filled


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), tokens=st.integers(40, 3000), lanes=st.sampled_from([1, 2, 5]))
def test_lanes_are_filled_in_turn_until_the_next_sequence_does_not_fit(seed, n, tokens, lanes):
    found = packing(tokens, seed, lanes, rng(seed, "sizes").integers(4, 200, n))
    expected = by_hand(found, 6 * lanes)
    for step in range(6):
        for lane in range(lanes):
            assert list(found.batch(step, lane, lanes)) == expected[step * lanes + lane]


def test_a_global_batch_is_the_same_at_any_number_of_processes_and_asked_for_in_any_order():
    whole = packing()
    steps = [list(whole.batch(step)) for step in range(40)]
    assert [position for batch in steps for position in batch] == list(range(sum(map(len, steps))))
    assert len({len(batch) for batch in steps}) > 3
    for world in (2, 4):
        for step in (37, 3, 0, 12):
            shares = [list(packing().batch(step, rank, world)) for rank in range(world)]
            assert [position for share in shares for position in share] == steps[step]
            assert all(shares)


def test_no_lane_holds_more_tiles_than_its_share_but_for_a_sequence_that_is_larger_by_itself():
    found = packing(tokens=800)
    loads = []
    for step in range(100):
        for lane in range(4):
            tiles = [int(found.sizes[found.sequence_at(k)]) for k in found.batch(step, lane, 4)]
            assert sum(tiles) <= 200 or len(tiles) == 1
            assert len(tiles) <= 10
            loads.append(min(sum(tiles), 200))
    assert np.mean(loads) > 0.7 * 200


def test_every_pass_holds_every_sequence_once_in_an_order_of_its_own():
    found = packing()
    passes = [[found.sequence_at(p * 50 + k) for k in range(50)] for p in range(3)]
    assert all(sorted(order) == list(range(50)) for order in passes)
    assert passes[0] != passes[1] != passes[2] and packing(seed=1).sequence_at(0) != passes[0][0]


def test_without_a_token_budget_every_batch_has_the_same_number():
    found = packing(tokens=None)
    assert list(found.batch(7)) == list(range(280, 320)) and list(found.batch(7, 1, 4)) == list(range(290, 300))
    assert list(packing(tokens=10**9).batch(7)) == list(range(280, 320))


def test_numbers_that_do_not_divide_are_faults_that_name_the_settings():
    with pytest.raises(Fault, match=r"data\.batch_size=40 .* data\.lanes=3"):
        packing(lanes=3)
    with pytest.raises(Fault, match=r"data\.lanes=4 .* 3 processes"):
        packing().batch(0, 0, 3)
    with pytest.raises(Fault, match=r"data\.batch_tokens=3"):
        packing(tokens=3)
