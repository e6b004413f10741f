"""Level-0 pixels, cells and microns: every way there leads back."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.fault import Fault
from data.slides.coordinates import cell_of, cell_origin, exact_downsamples, plan_grid, row_major

sides = st.floats(1.0, 40_000.0) | st.integers(1, 40_000).map(float)
cells = st.integers(0, 50_000)


@given(sides, cells)
def test_a_cells_tile_lies_in_that_cell(side: float, cell: int) -> None:
    assert cell_of(cell_origin(cell, side), side) == cell


@given(sides, cells)
@example(1.1, 650)  # 650 · 1.1 is rounded up past 715
def test_a_tile_starts_at_the_first_pixel_of_its_cell(side: float, cell: int) -> None:
    x = int(cell_origin(cell, side))
    assert abs(x - cell * side) <= 1
    assert x == 0 or cell_of(x - 1, side) < cell


@given(st.floats(0.05, 4.0), st.integers(0, 2_000_000))
def test_microns_and_back_give_the_same_pixel(mpp: float, x: int) -> None:
    grid = plan_grid([(2_000_000, 10)], mpp, mpp, 1, "slide")
    assert round(float(grid.level0(grid.microns(x)))) == x


@given(
    st.floats(0.1, 1.0), st.floats(0.25, 4.0), st.sampled_from([96, 224, 256, 512]),
    st.integers(600, 120_000), st.integers(600, 120_000), st.floats(1.5, 4.2), st.integers(1, 5),
)  # fmt: skip
def test_tiles_have_the_size_they_claim_and_stay_on_the_slide(
    mpp0: float, mpp: float, tile: int, width: int, height: int, step: float, levels: int
) -> None:
    dimensions = [(max(1, int(width / step**i)), max(1, int(height / step**i))) for i in range(levels)]
    if mpp0 > mpp * 1.02:
        with pytest.raises(Fault, match="never enlarged"):
            plan_grid(dimensions, mpp0, mpp, tile, "slide")
        return
    grid = plan_grid(dimensions, mpp0, mpp, tile, "slide")
    assert grid.tile_size_level0 * grid.mpp_level0 == pytest.approx(grid.tile_size * grid.mpp, rel=1e-12)
    assert abs(grid.mpp / mpp - 1) <= 0.02 + 1e-9
    assert grid.mpp_level0 * grid.downsample <= mpp * 1.02 + 1e-9
    for columns, length in ((grid.columns, width), (grid.rows, height)):
        if columns:
            assert grid.origin(columns - 1) + grid.tile_size_level0 < length + 1
            assert (columns + 1) * grid.tile_size_level0 > length * (1 - 1e-12)
    if grid.columns and grid.rows:
        left, top, side = grid.level_box(int(grid.origin(grid.columns - 1)), int(grid.origin(grid.rows - 1)))
        assert left >= 0 and top >= 0
        assert (left + side) * grid.downsample <= width + grid.downsample
        assert (top + side) * grid.downsample <= height + grid.downsample


def test_a_scanner_at_0_499_is_cut_one_to_one_and_says_so() -> None:
    grid = plan_grid([(2220, 2967)], 0.499, 0.5, 256, "slide")
    assert (grid.tile_size_level0, grid.mpp, grid.resampled, grid.columns, grid.rows) == (256.0, 0.499, False, 8, 11)


def test_a_scanner_at_0_2527_is_cut_one_to_one_from_its_half_size_level() -> None:
    grid = plan_grid([(40_001, 30_001), (20_000, 15_000), (10_000, 7_500)], 0.2527, 0.5, 256, "slide")
    assert (grid.level, grid.downsample, grid.tile_size_level0, grid.resampled) == (1, 2.0, 512.0, False)
    assert grid.mpp == pytest.approx(0.5054)


def test_a_scale_between_levels_is_shrunk_from_the_finer_one() -> None:
    grid = plan_grid([(40_000, 30_000), (10_000, 7_500)], 0.25, 0.5, 256, "slide")
    assert (grid.level, grid.tile_size_level0, grid.mpp, grid.resampled) == (0, 512.0, 0.5, True)
    grid = plan_grid([(40_000, 30_000)], 0.23, 0.5, 256, "slide")
    assert grid.tile_size_level0 == pytest.approx(556.5217391304348, rel=1e-15)


def test_levels_with_rounded_sizes_have_whole_downsamples_and_others_keep_theirs() -> None:
    assert exact_downsamples([(4443, 3567), (2221, 1783)]) == [1.0, 2.0]
    assert exact_downsamples([(100_001, 80_003), (25_000, 20_000), (6250, 5000)]) == [1.0, 4.0, 16.0]
    assert exact_downsamples([(10_000, 8_000), (4_000, 3_200)]) == [1.0, 2.5]


def test_a_slide_coarser_than_asked_is_refused_by_name() -> None:
    with pytest.raises(Fault, match=r"old\.svs.*mpp=1"):
        plan_grid([(1000, 1000)], 1.0, 0.5, 256, "old.svs")


def test_row_major_is_by_y_then_x() -> None:
    x, y = np.array([5, 0, 5, 0]), np.array([9, 9, 0, 0])
    assert row_major(x, y).tolist() == [3, 2, 1, 0]


downsampled = st.tuples(
    st.floats(0.1, 0.6) | st.just(0.2527),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    st.sampled_from([224, 256, 512]),
    st.integers(20_000, 200_000),
    st.integers(20_000, 200_000),
    st.floats(1.3, 4.4),
    st.integers(1, 5),
)


@given(downsampled, st.integers(0, 10**6), st.integers(0, 10**6))
def test_cell_pixel_and_micron_lead_back_to_each_other_at_any_downsample(
    scan: tuple[float, float, int, int, int, float, int], column: int, row: int
) -> None:
    """Grid → level-0 → µm → level-0 → grid, exactly, also where the levels' downsamples are not whole."""
    mpp0, mpp, tile, width, height, step, levels = scan
    if mpp0 > mpp * 1.02:
        return
    dimensions = [(max(1, round(width / step**i)), max(1, round(height / step**i))) for i in range(levels)]
    grid = plan_grid(dimensions, mpp0, mpp, tile, "slide")
    if not grid.columns or not grid.rows:
        return
    cells = np.array([column % grid.columns, row % grid.rows, grid.columns - 1, grid.rows - 1, 0])
    x = grid.origin(cells)
    back = np.round(grid.level0(grid.microns(x))).astype(np.int64)
    assert back.tolist() == x.tolist() and grid.cell(back).tolist() == cells.tolist()
    # Distances in µm are what the delivered pixels say they are: n cells are n · tile · mpp, but for the rounding up of
    # a corner.
    np.testing.assert_allclose(grid.microns(x), cells * tile * grid.mpp, atol=mpp0 * (1 + 1e-6))


@given(st.integers(20_000, 120_000), st.integers(20_000, 120_000), st.sampled_from([2, 4]))
def test_a_scanner_at_0_2527_gives_whole_pixels_at_every_nominal_scale(width: int, height: int, step: int) -> None:
    dimensions = [(width // step**i, height // step**i) for i in range(4)]
    for mpp, factor in ((0.25, 1), (0.5, 2), (1.0, 4)):
        grid = plan_grid(dimensions, 0.2527, mpp, 256, "slide")
        if factor in (1, step):
            assert not grid.resampled and grid.tile_size_level0 == 256 * factor and grid.mpp == 0.2527 * factor
        else:
            assert grid.tile_size_level0 * 0.2527 == pytest.approx(256 * grid.mpp, rel=1e-12)
            assert grid.downsample <= factor * 1.02
