"""Which samples skip: a function of (seed, step, group), whoever computes them."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from data.stochastic_depth import StochasticDepth
from pretrain.objectives.interface import Moment
from pretrain.objectives.packed_views import kept_of_views
from tests.models.drawn_depth import drawn_samples
from tests.pretrain.objectives.tile_objectives import batch, dinov2

VIEWS = [(2, 5), (3, 2)]  # (views, tokens per crop) of two crop sizes


def crops(
    tiles: int, first: int = 0, group: int = 4, rate: float = 0.4, step: int = 0, seed: int = 0
) -> list[list[set[tuple[int, int, int]]]]:
    """Per block and branch the kept crops as (crop size, view, tile of the global batch)."""
    kept = drawn_samples(VIEWS, tiles, group=group, rate=rate, depth=3, seed=seed, step=step, first=first)
    assert kept is not None
    place = {}
    row = 0
    for size, (views, tokens) in enumerate(VIEWS):
        for view in range(views):
            for tile in range(tiles):
                for _ in range(tokens):
                    place[row] = (size, view, first + tile)
                    row += 1
    return [[{place[r] for r in branch.rows.tolist()} for branch in branches] for branches in kept]


@given(st.integers(1, 4), st.integers(2, 6), st.floats(0.05, 0.95), st.integers(0, 20))
def test_every_group_keeps_the_set_number_of_whole_crops(groups: int, group: int, rate: float, step: int) -> None:
    tiles = groups * group
    kept = drawn_samples(VIEWS, tiles, group=group, rate=rate, depth=2, seed=0, step=step, first=0)
    assert kept is not None
    for branches in kept:
        for branch in branches:
            offset, begin = 0, 0
            for (views, tokens), (count, length), scale in zip(VIEWS, branch.shapes, branch.scales, strict=True):
                keep = max(1, int(views * group * (1 - rate)))
                assert (count, length) == (groups * keep, tokens)
                rows = branch.rows[begin : begin + count * length].view(count, length) - offset
                assert torch.equal(rows, rows[:, :1] + torch.arange(length)) and not (rows[:, 0] % length).any()
                whole = rows[:, 0] // length
                assert len(set(whole.tolist())) == count and whole.min() >= 0 and whole.max() < views * tiles
                assert torch.equal(
                    torch.bincount(whole % tiles // group, minlength=groups), torch.full((groups,), keep)
                )
                assert scale == views * group / keep
                offset, begin = offset + views * tiles * tokens, begin + count * length


def test_ranks_and_micro_batches_keep_together_what_the_whole_batch_keeps() -> None:
    whole = crops(16)
    for size in (4, 8):
        parts = [crops(size, first) for first in range(0, 16, size)]
        assert [
            [set().union(*(part[block][branch] for part in parts)) for branch in range(2)] for block in range(3)
        ] == whole


def test_steps_seeds_blocks_and_branches_draw_apart() -> None:
    base = crops(8)
    assert crops(8, step=1) != base and crops(8, seed=1) != base
    assert base[0][0] != base[0][1] and base[0] != base[1]


def test_every_crop_is_kept_equally_often() -> None:
    counts: dict[tuple[int, int, int], int] = {}
    for step in range(300):
        for crop in crops(4, step=step)[0][0]:
            counts[crop] = counts.get(crop, 0) + 1
    for (size, _, _), count in counts.items():
        share = [int(8 * 0.6) / 8, int(12 * 0.6) / 12][size]
        assert abs(count / 300 - share) < 5 * (share * (1 - share) / 300) ** 0.5
    assert len(counts) == 20


def test_rates_that_rise_skip_nothing_at_first_and_their_full_share_at_last() -> None:
    objective, whole = dinov2(drop_path=0.5, depth=3, drop_path_rising=True), batch(4)
    assert objective.student.encoder.drop_rates == (0.0, 0.25, 0.5)
    kept = kept_of_views(objective.student.encoder, 2, whole, Moment(0, 10, 7))
    assert kept is not None and kept[0] is None
    # Groups of 2 tiles with 2 global and 3 local views: of 4 and 6 crops 3 and 4 stay, then 2 and 3.
    shapes = [[crops for crops, _ in branch.shapes] for block in kept if block for branch in block]
    assert shapes == [[6, 8], [6, 8], [4, 6], [4, 6]]
    depth = objective.stochastic_depth()
    assert depth is not None
    constant = StochasticDepth(depth.group, (0.5,) * 3).draw([2, 3], 4, seed=7, step=0, first=0)
    rising = depth.draw([2, 3], 4, seed=7, step=0, first=0)
    assert all(a.tolist()[-len(b) // 3 :] == b.tolist()[-len(b) // 3 :] for a, b in zip(rising, constant, strict=True))


def test_what_the_loader_drew_is_what_the_step_draws_and_nothing_is_skipped_in_evaluation() -> None:
    objective, whole = dinov2(drop_path=0.4), batch(4)
    depth, moment = objective.stochastic_depth(), Moment(3, 10, 7, first=4)
    assert depth is not None
    drawn = depth.draw([views for _, views in whole.crops], 4, seed=7, step=3, first=4)
    loaded = replace(whole, kept=[torch.from_numpy(crops) for crops in drawn])
    one, other = (objective.student_tokens(part, moment, masked=True) for part in (whole, loaded))
    assert all(torch.equal(a, b) for a, b in zip(sum(one, ()), sum(other, ()), strict=True))
    objective.eval()
    assert objective.stochastic_depth() is None
    found = objective.student_tokens(loaded, moment, masked=True)
    objective.student.encoder.drop_path = 0.0
    expected = objective.train().student_tokens(whole, moment, masked=True)
    assert all(torch.equal(a, b) for a, b in zip(sum(found, ()), sum(expected, ()), strict=True))
