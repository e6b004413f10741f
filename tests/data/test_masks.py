"""Block masks: exactly a share of the crops, ratios spread evenly, rectangles up to the target."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import masks
from data.keyed import rng


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 9), st.integers(0, 50))
def test_exactly_the_share_of_the_crops_is_masked(crops: int, share: float, seed: int, step: int) -> None:
    drawn = masks.ratios(crops, share, 0.1, 0.5, seed, step)
    assert drawn.shape == (crops,)
    assert (drawn > 0).sum() == int(crops * share)


def test_each_ratio_comes_from_its_own_equal_part_of_the_range() -> None:
    drawn = np.sort(masks.ratios(64, 0.5, 0.1, 0.5, seed=0, step=3))[32:]
    edges = np.linspace(0.1, 0.5, 33)
    assert (drawn >= edges[:-1]).all() and (drawn <= edges[1:]).all()


def test_who_is_masked_changes_from_step_to_step_and_is_a_function_of_it() -> None:
    first, second = (masks.ratios(32, 0.5, 0.1, 0.5, 0, step) > 0 for step in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, masks.ratios(32, 0.5, 0.1, 0.5, 0, 0) > 0)


@given(st.integers(2, 24), st.integers(2, 24), st.floats(0, 0.9), st.integers(0, 1000))
def test_never_more_patches_than_wanted(rows: int, columns: int, ratio: float, sample: int) -> None:
    mask = masks.blocks(rows, columns, ratio, rng(0, "mask", sample))
    assert mask.shape == (rows, columns) and mask.dtype == bool
    assert mask.sum() <= int(rows * columns * ratio)


@pytest.mark.parametrize("grid", [14, 16])
def test_a_masked_crop_of_a_usual_grid_is_never_left_unmasked(grid: int) -> None:
    for sample in range(300):
        assert masks.blocks(grid, grid, 0.1, rng(0, "mask", sample)).any()


def test_masks_are_made_of_blocks_not_of_scattered_patches() -> None:
    together = []
    for sample in range(100):
        mask = masks.blocks(16, 16, 0.3, rng(1, "mask", sample))
        right = mask[:, 1:] & mask[:, :-1]
        together.append(right.sum() / mask[:, :-1].sum())
    assert np.mean(together) > 0.6  # a scattered mask of the same size has 0.3


@given(st.integers(4, 20), st.floats(0, 0.9), st.floats(0, 1), st.integers(0, 300))
def test_exact_masks_hide_exactly_a_share_of_the_places_that_there_are(
    side: int, ratio: float, filled: float, sample: int
) -> None:
    valid = rng("valid", sample).random((side, side)) < filled
    mask = masks.exact_blocks(valid, ratio, rng(0, "mask", sample))
    assert mask.sum() == round(ratio * valid.sum()) and not (mask & ~valid).any()


@given(st.integers(2, 24), st.integers(1, 6), st.floats(0.01, 1), st.integers(0, 300))
def test_squares_are_whole_inside_the_grid_and_everywhere_in_it(
    grid: int, count: int, area: float, sample: int
) -> None:
    mask, side = masks.squares(grid, count, area, rng(0, "mask", sample)), masks.square_side(grid, area)
    assert mask.shape == (grid, grid) and side**2 <= mask.sum() <= min(count * side**2, grid**2)
    whole = np.lib.stride_tricks.sliding_window_view(mask, (side, side)).all((2, 3))
    covered = np.zeros_like(mask)
    for top, left in zip(*np.nonzero(whole), strict=True):
        covered[top : top + side, left : left + side] = True
    assert np.array_equal(covered, mask)


def test_single_patches_are_as_many_as_the_ratio_says_and_hardly_touch() -> None:
    drawn = [masks.scattered(16, 16, 0.3, rng(1, "mask", sample)) for sample in range(100)]
    assert {int(mask.sum()) for mask in drawn} == {int(256 * 0.3)}
    assert np.mean([(mask[:, 1:] & mask[:, :-1]).sum() / mask[:, :-1].sum() for mask in drawn]) < 0.35


@pytest.mark.parametrize("kind", masks.MASK_KINDS)
def test_what_is_masked_in_the_mean_is_known_beforehand(kind: str) -> None:
    masking = masks.Masking(0.5, 0.1, 0.45, 16, kind=kind, squares=4, square_area=0.1)
    ratios = masking.ratios(400, seed=0, step=0)
    found = [masking.mask(ratio, rng(0, "mask", number)).sum() for number, ratio in enumerate(ratios)]
    assert sum(map(bool, found)) == 200
    assert sum(found) == pytest.approx(masking.expected(400), rel=0.03)
