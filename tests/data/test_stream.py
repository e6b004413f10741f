"""The order of tiles is a pure function of (seed, position)."""

import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.fault import Fault
from data.stream import Stream

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12)
LANES = st.sampled_from([1, 2, 3, 4, 8])


def stream(sizes: list[int], lanes: int = 8, each: int = 2, window: int = 3, seed: int = 0) -> Stream:
    return Stream(np.array(sizes), batch_size=lanes * each, lanes=lanes, window=window, seed=seed)


@given(SIZES, st.integers(1, 4), st.integers(0, 5), st.integers(0, 200))
def test_any_number_of_ranks_reads_the_same_global_batches(sizes: list[int], each: int, seed: int, step: int) -> None:
    assume(sum(sizes) >= 8)
    whole = stream(sizes, 8, each, seed=seed).batch(step)
    assert len(whole) == 8 * each
    for world in (2, 4, 8):
        shares = [stream(sizes, 8, each, seed=seed).batch(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(shares), whole)


@settings(max_examples=60)
@given(SIZES, LANES, st.integers(1, 5), st.integers(0, 3))
def test_a_lane_gives_each_tile_of_a_pass_once_before_any_twice(
    sizes: list[int], lanes: int, window: int, seed: int
) -> None:
    assume(sum(sizes) >= lanes)
    order = stream(sizes, lanes, 1, window, seed)
    for lane in range(lanes):
        length = (lane + 1) * order.tiles // lanes - lane * order.tiles // lanes
        for number in range(3):
            tiles = order.lane(lane, number * length, length)
            assert len(set(tiles.tolist())) == length


@settings(max_examples=60)
@given(SIZES, LANES, st.integers(1, 5), st.integers(0, 3))
def test_a_pass_over_all_lanes_holds_every_tile_exactly_once(
    sizes: list[int], lanes: int, window: int, seed: int
) -> None:
    assume(sum(sizes) >= lanes)
    order = stream(sizes, lanes, 1, window, seed)
    lengths = [(lane + 1) * order.tiles // lanes - lane * order.tiles // lanes for lane in range(lanes)]
    for number in range(3):
        tiles = np.concatenate([order.lane(lane, number * n, n) for lane, n in enumerate(lengths)])
        assert np.array_equal(np.sort(tiles), np.arange(order.tiles))


@given(SIZES, LANES, st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_a_position_gives_the_same_tiles_however_it_was_reached(sizes: list[int], lanes: int, steps: list[int]) -> None:
    assume(sum(sizes) >= lanes)
    visited = stream(sizes, lanes)
    for step in steps:  # back and forth through one stream, each time against a fresh one
        assert np.array_equal(visited.batch(step), stream(sizes, lanes).batch(step))


def test_walking_through_a_lane_in_any_stride_gives_one_sequence() -> None:
    order = stream([7, 11, 5, 13], lanes=2)
    whole = order.lane(1, 0, 120)
    for stride in (1, 3, 17):
        assert np.array_equal(
            np.concatenate([order.lane(1, at, stride) for at in range(0, 120 - stride, stride)]),
            whole[: len(range(0, 120 - stride, stride)) * stride],
        )


def test_a_far_position_is_found_without_walking_there() -> None:
    order = Stream(np.full(1000, 1000), batch_size=64, lanes=8, window=4, seed=0)
    began = time.perf_counter()
    far = order.batch(10**9)
    assert time.perf_counter() - began < 1.0
    assert len(set(far.tolist())) == 64


def test_the_order_depends_on_the_seed_and_on_the_pass() -> None:
    sizes = [20] * 10
    first = stream(sizes, 1, 200).batch(0)
    assert not np.array_equal(first, stream(sizes, 1, 200, seed=1).batch(0))
    assert not np.array_equal(first, stream(sizes, 1, 200).batch(1))


def test_a_window_holds_the_tiles_of_its_blocks_only_and_mixes_them() -> None:
    order = stream([10] * 12, lanes=1, window=3)
    tiles = order.lane(0, 0, 120).reshape(4, 30)
    for window in tiles:
        assert len({int(tile) // 10 for tile in window}) == 3
        assert len({int(tile) // 10 for tile in window[:10]}) > 1, "tiles of a block come in a run"


def test_numbers_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(Fault, match=r"data\.batch_size=10 .* data\.lanes=4"):
        Stream(np.array([100]), batch_size=10, lanes=4, window=1, seed=0)
    with pytest.raises(Fault, match=r"3 tiles, fewer than data\.lanes=4"):
        Stream(np.array([3]), batch_size=4, lanes=4, window=1, seed=0)
    with pytest.raises(Fault, match=r"data\.lanes=8 is not a multiple of the 3 processes"):
        stream([100]).batch(0, 0, 3)
