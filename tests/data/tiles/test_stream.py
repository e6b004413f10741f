"""The order of tiles is a pure function of (seed, position)."""

import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.fault import Fault
from data.tiles.stream import Part, Stream

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12)
LANES = st.sampled_from([1, 2, 3, 4, 8])


def stream(sizes: list[int], lanes: int = 8, each: int = 2, window: int = 3, seed: int = 0) -> Stream:
    return Stream([Part(np.array(sizes))], batch_size=lanes * each, lanes=lanes, window=window, seed=seed)


@settings(deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(0, 5), st.integers(0, 200))
def test_any_number_of_ranks_reads_the_same_global_batches(sizes: list[int], each: int, seed: int, step: int) -> None:
    assume(sum(sizes) >= 8)
    whole = stream(sizes, 8, each, seed=seed).batch(step)
    assert len(whole) == 8 * each
    for world in (2, 4, 8):
        shares = [stream(sizes, 8, each, seed=seed).batch(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(shares), whole)


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
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


@settings(deadline=None)
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
    order = Stream([Part(np.full(1000, 1000))], batch_size=64, lanes=8, window=4, seed=0)
    began = time.thread_time()
    far = order.batch(10**9)
    assert time.thread_time() - began < 1.0  # walking takes hours
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
        Stream([Part(np.array([100]))], batch_size=10, lanes=4, window=1, seed=0)
    with pytest.raises(Fault, match=r"3 tiles, fewer than data\.lanes=4"):
        Stream([Part(np.array([3]))], batch_size=4, lanes=4, window=1, seed=0)
    with pytest.raises(Fault, match=r"data\.lanes=8 is not a multiple of the 3 processes"):
        stream([100]).batch(0, 0, 3)


# Mixtures ----------------------------------------------------------------------------------------------------------

PARTS = st.lists(
    st.tuples(st.lists(st.integers(1, 30), min_size=3, max_size=8), st.integers(1, 9)), min_size=2, max_size=4
)


def mixed(parts: list[tuple[list[int], int]], lanes: int = 8, each: int = 2, slides: int | None = None) -> Stream:
    made = [Part(np.array(sizes), weight, f"part {i}") for i, (sizes, weight) in enumerate(parts)]
    return Stream(made, batch_size=lanes * each, lanes=lanes, window=2, seed=0, slides_per_lane=slides)


@settings(max_examples=60, deadline=None)
@given(PARTS, st.sampled_from([(2, None), (4, 1), (4, 2)]), st.integers(0, 300))
def test_a_mixture_is_the_same_for_any_world_and_from_any_start(
    parts: list[tuple[list[int], int]], shape: tuple[int, int | None], step: int
) -> None:
    assume(min(sum(sizes) for sizes, _ in parts) >= 8)
    each, slides = shape
    walked = mixed(parts, 8, each, slides)
    for earlier in (0, step // 2):
        walked.batch(earlier)
    whole = walked.batch(step)
    for world in (1, 2, 4, 8):
        fresh = [mixed(parts, 8, each, slides) for _ in range(world)]
        assert np.array_equal(np.concatenate([fresh[r].batch(step, r, world) for r in range(world)]), whole)


@settings(max_examples=40, deadline=None)
@given(PARTS, LANES, st.sampled_from([(1, None), (6, 2), (4, 1)]))
def test_a_lane_of_a_mixture_gives_each_tile_of_a_part_once_before_any_twice(
    parts: list[tuple[list[int], int]], lanes: int, shape: tuple[int, int | None]
) -> None:
    assume(min(sum(sizes) for sizes, _ in parts) >= lanes)
    each, slides = shape
    order = mixed(parts, lanes, each, slides)
    firsts = np.cumsum([0, *(sum(sizes) for sizes, _ in parts)])
    for lane in range(lanes):
        taken = order.lane(lane, 0, 1200 // each * each)
        for which, (sizes, _) in enumerate(parts):
            mine = taken[(taken >= firsts[which]) & (taken < firsts[which + 1])]
            length = (lane + 1) * sum(sizes) // lanes - lane * sum(sizes) // lanes
            for begin in range(0, len(mine) - length + 1, length):
                assert len(set(mine[begin : begin + length].tolist())) == length


@settings(max_examples=40, deadline=None)
@given(PARTS, st.integers(0, 10**9))
def test_every_batch_and_every_lane_hold_the_shares(parts: list[tuple[list[int], int]], step: int) -> None:
    assume(min(sum(sizes) for sizes, _ in parts) >= 8)
    order = mixed(parts, 8, 4)
    firsts = np.cumsum([0, *(sum(sizes) for sizes, _ in parts)])
    weights = np.array([weight for _, weight in parts])
    for taken in (order.batch(step), order.lane(3, step, 100)):
        counts = np.histogram(taken, firsts)[0]
        assert (np.abs(counts - len(taken) * weights / weights.sum()) < len(parts) + 1).all()


def test_one_part_is_not_a_mixture() -> None:
    alone, share = stream([7, 11, 5, 13], 4), mixed([([7, 11, 5, 13], 3), ([4, 4], 1)], 4)
    mine = np.concatenate([share.lane(1, 0, 400)])
    expected = Stream([Part(np.array([7, 11, 5, 13]))], batch_size=8, lanes=4, window=2, seed=0)
    mine = mine[mine < 36]
    assert len(mine) == 300 and np.array_equal(mine, expected.lane(1, 0, 300)) and alone.tiles == 36


# One or several slides a lane and step -----------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=4, max_size=14), st.sampled_from([(4, 1), (8, 2), (6, 3), (5, 1)]), st.integers(1, 4), st.integers(0, 3))  # fmt: skip
def test_a_step_takes_its_tiles_from_the_asked_number_of_slides(
    slides: list[int], shape: tuple[int, int], window: int, seed: int
) -> None:
    each, wanted = shape
    lanes, group = 2, each // wanted
    assume(sum(slides) >= lanes * group)
    sizes = np.array(slides)
    order = Stream(
        [Part(sizes)], batch_size=lanes * each, lanes=lanes, window=window, seed=seed, slides_per_lane=wanted
    )
    slide_of = np.repeat(np.arange(len(sizes)), sizes)
    passes = 3
    for lane in range(lanes):
        length = (lane + 1) * order.tiles // lanes - lane * order.tiles // lanes
        taken = order.lane(lane, 0, passes * length)
        for number in range(passes):  # still every tile once before any twice
            assert len(set(taken[number * length : (number + 1) * length].tolist())) == length
        groups = slide_of[taken[: len(taken) // group * group]].reshape(-1, group)
        pure = int((groups.min(1) == groups.max(1)).sum())
        # At least all whole groups of every piece are pure, but for one that each window may have to break up.
        pieces = len(sizes) + 2 * lanes
        assert pure >= sum(max(0, n // group - 2) for n in slides) // lanes - pieces - passes


def test_slides_that_fill_their_groups_are_never_mixed() -> None:
    order = Stream([Part(np.full(12, 16))], batch_size=16, lanes=2, window=3, seed=0, slides_per_lane=2)
    groups = order.lane(0, 0, 960).reshape(-1, 4) // 16  # a lane's pass is 96 tiles: its stretch ends with a slide
    assert (groups.min(1) == groups.max(1)).all()
    consecutive = groups[:, 0].reshape(-1, 2)
    assert (consecutive[:, 0] != consecutive[:, 1]).mean() > 0.3, "a slide's groups come in a run"


def test_a_number_of_slides_that_does_not_divide_is_refused() -> None:
    with pytest.raises(Fault, match=r"data\.slides_per_lane=3 doesn't divide the 4 tiles"):
        Stream([Part(np.array([100]))], batch_size=8, lanes=2, window=1, seed=0, slides_per_lane=3)
