"""Batches are the same whoever loads them: any number of ranks, threads and starts."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.fault import Fault
from data.masks import Masking
from data.slides.tissue import saturated_share
from data.stochastic_depth import StochasticDepth
from data.tiles import loader
from data.tiles.augment_parameters import Colour
from data.tiles.crops import CropSizes
from data.tiles.loader import MicroBatch, RankBatch, TileBatches
from data.tiles.of_shards import ShardTiles
from data.tiles.stream import Stream
from tests.data.shards.tile_folders import spoil, write_tiles

SIZES = CropSizes(2, 24, (0.32, 1.0), 2, 16, (0.05, 0.32))
BATCH = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiles(tmp_path / "shards", [11, 13])


def batches(
    folder: Path,
    *,
    start: int = 0,
    stop: int = 3,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    threads: int = 2,
    seed: int = 0,
    depth: StochasticDepth | None = None,
) -> TileBatches:
    tiles = ShardTiles(shards=[folder])
    stream = Stream(tiles.parts, batch_size=BATCH, lanes=4, window=1, seed=seed)
    return TileBatches(
        tiles,
        stream,
        SIZES,
        Colour(),
        Masking(0.5, 0.1, 0.5, 8),
        seed=seed,
        start=start,
        stop=stop,
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
        threads=threads,
        depth=depth,
    )


def load(folder: Path, **settings: Any) -> list[RankBatch]:
    found = list(batches(folder, **settings))
    assert all(isinstance(batch, RankBatch) for batch in found)
    return found  # type: ignore[return-value]


def by_tile(parts: list[MicroBatch]) -> list[torch.Tensor]:
    """Everything in micro-batches that lie one behind the other, tile after tile: numbers, pixels, parameters,
    masks."""

    def tiles_first(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(
            [
                value.unflatten(0, (-1, len(part.numbers))).transpose(0, 1)
                for value, part in zip(values, parts, strict=True)
            ]
        )

    per_size = range(len(parts[0].views))
    return [
        torch.cat([part.numbers for part in parts]),
        *[tiles_first([part.views[size] for part in parts]) for size in per_size],
        *[tiles_first([part.parameters[size] for part in parts]) for size in per_size],
        tiles_first([part.masks for part in parts]),
    ]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_load_together_what_one_loads_alone(folder: Path, world_size: int) -> None:
    alone = load(folder)
    ranks = [load(folder, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        parts = [part for rank in ranks for part in rank[step].parts]
        assert [part.first for part in parts] == [rank * BATCH // world_size for rank in range(world_size)]
        assert same(by_tile(parts), by_tile(whole.parts))


def test_the_crops_that_skip_branches_travel_with_their_micro_batch(folder: Path) -> None:
    depth = StochasticDepth(group=2, rates=(0.0, 0.4, 0.7))
    ranks = [load(folder, rank=rank, world_size=2, accumulate=2, depth=depth) for rank in range(2)]
    for step in range(3):
        for part in [part for rank in ranks for part in rank[step].parts]:
            expected = depth.draw([2, 2], 2, seed=0, step=step, first=part.first)
            for kept in (part.kept, pickle.loads(pickle.dumps(part)).kept):
                assert [crops.tolist() for crops in kept] == [crops.tolist() for crops in expected]


def test_the_number_of_threads_changes_nothing(folder: Path) -> None:
    one = load(folder, threads=1)
    for threads in (2, 7):
        assert all(
            same(by_tile(a.parts), by_tile(b.parts)) for a, b in zip(one, load(folder, threads=threads), strict=True)
        )


def test_starting_anywhere_gives_the_batches_of_the_uninterrupted_run(folder: Path) -> None:
    whole = load(folder, stop=7)
    for start in (1, 3, 6):
        later = load(folder, start=start, stop=7)
        assert [batch.step for batch in later] == list(range(start, 7))
        assert all(same(by_tile(a.parts), by_tile(b.parts)) for a, b in zip(whole[start:], later, strict=True))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_splits_the_same_samples(folder: Path, accumulate: int) -> None:
    for whole, split in zip(load(folder), load(folder, accumulate=accumulate), strict=True):
        assert [part.first for part in split.parts] == [i * BATCH // accumulate for i in range(accumulate)]
        assert same(by_tile(split.parts), by_tile(whole.parts))


def test_another_seed_changes_tiles_pixels_parameters_and_masks(folder: Path) -> None:
    one, other = (by_tile(load(folder, seed=seed, stop=1)[0].parts) for seed in (0, 1))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class HalfGrey(ShardTiles):
    """Every second tile has no colour; the first block, of 11, has none but in its last tile."""

    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        tile = super().read(number, seed, sample)
        coloured = number == 10 if number < 11 else number % 2 == 0
        return tile if coloured else np.repeat(tile.mean(axis=2, keepdims=True).astype(np.uint8), 3, 2)


def test_pale_tiles_are_passed_over_for_others_of_their_block_whoever_loads_them(folder: Path) -> None:
    def loaded(rank: int, world_size: int, least: float | None = 0.5) -> list[RankBatch]:
        found = batches(folder, rank=rank, world_size=world_size, stop=12)
        found.tiles, found.min_saturated = HalfGrey(shards=[str(folder)]), least
        return list(found)

    alone, as_they_come = loaded(0, 1), loaded(0, 1, None)
    wanted, taken = (
        np.concatenate([part.numbers for batch in every for part in batch.parts]) for every in (as_they_come, alone)
    )
    assert ((taken % 2 == 0) & (taken >= 10)).all() and not any(batch.pale for batch in as_they_come)
    np.testing.assert_array_equal(wanted < 11, taken < 11)
    fine = (wanted % 2 == 0) & (wanted >= 10)
    np.testing.assert_array_equal(taken[fine], wanted[fine])
    pale = [number for batch in alone for number in batch.pale]
    assert (~fine).sum() <= len(pale) and not any(number % 2 == 0 and number >= 10 for number in pale)
    assert len(set(taken[taken >= 11].tolist())) > 4, "not one stands in for all"
    for both in zip(alone, loaded(0, 2), loaded(1, 2), strict=True):
        whole, *ranks = both
        assert same(by_tile([part for rank in ranks for part in rank.parts]), by_tile(whole.parts))
        assert sorted(whole.pale) == sorted(number for rank in ranks for number in rank.pale)


def test_where_a_block_has_no_coloured_tile_the_most_coloured_is_taken(folder: Path) -> None:
    found = batches(folder, stop=1)
    found.min_saturated = 1.1  # more than there is
    (batch,) = found
    blocks = [found.stream.block(number) for number in batch.parts[0].numbers.tolist()]
    shares = [saturated_share(found.tiles.read(number)) for number in range(24)]
    for number, block in zip(batch.parts[0].numbers.tolist(), blocks, strict=True):
        assert shares[number] == max(shares[other] for other in block)
    assert len(batch.pale) == sum(len(block) - 1 for block in blocks)


def test_exactly_half_of_the_global_batch_is_masked_however_it_is_shared(folder: Path) -> None:
    for world_size in (1, 2, 4):
        ranks = [load(folder, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step in range(3):
            masked = sum(int(part.masks.flatten(1).any(1).sum()) for rank in ranks for part in rank[step].parts)
            assert masked == BATCH * SIZES.global_count // 2


def test_views_come_view_after_view_in_the_shapes_that_are_promised(folder: Path) -> None:
    (part,) = load(folder, stop=1)[0].parts
    assert part.views[0].shape == (2 * BATCH, 3, 24, 24) and part.views[1].shape == (2 * BATCH, 3, 16, 16)
    assert part.views[0].dtype == torch.uint8 and part.masks.shape == (2 * BATCH, 8, 8)
    blurred = part.parameters[0][:, 10] > 0
    assert not blurred[:BATCH].any() and blurred[BATCH:].any()  # kind 0 is never blurred, kind 1 nearly always
    whole = load(folder, stop=4)
    assert (
        len({int(number) for batch in whole[:3] for number in batch.parts[0].numbers}) == 24
    )  # a pass: every tile once


def test_an_unreadable_tile_is_replaced_by_the_next_and_named(folder: Path) -> None:
    before = load(folder)
    spoil(folder, [5])
    after = load(folder)
    messages = [message for batch in after for message in batch.bad]
    assert len(messages) == 1 and "slide0 (240, 0)" in messages[0] and "tiles-000000.tar" in messages[0]
    numbers = [torch.cat([batch.parts[0].numbers for batch in run]) for run in (before, after)]
    assert torch.equal(torch.where(numbers[0] == 5, 6, numbers[0]), numbers[1])
    for one, other in zip(before, after, strict=True):
        untouched = one.parts[0].numbers != 5
        assert all(
            torch.equal(a[untouched], b[untouched])
            for a, b in zip(by_tile(one.parts), by_tile(other.parts), strict=True)
        )


def test_ranks_replace_an_unreadable_tile_alike(folder: Path) -> None:
    spoil(folder, [5, 6, 23])
    whole = load(folder)
    ranks = [load(folder, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert same(by_tile([part for rank in ranks for part in rank[step].parts]), by_tile(batch.parts))
        assert sorted(batch.bad) == sorted(message for rank in ranks for message in rank[step].bad)


def test_a_source_of_bad_tiles_only_ends_in_a_fault_not_in_a_hang(folder: Path) -> None:
    spoil(folder, list(range(24)))
    with pytest.raises(Fault, match="a hundred tiles in a row can't be read"):
        list(batches(folder))


def test_the_loader_process_hands_over_the_same_batches_and_faults(folder: Path) -> None:
    direct = load(folder, stop=2)
    through = list(loader.loader_of(batches(folder, stop=2), pin_memory=False))
    assert all(same(by_tile(a.parts), by_tile(b.parts)) for a, b in zip(direct, through, strict=True))
    spoil(folder, list(range(24)))
    assert isinstance(list(loader.loader_of(batches(folder), pin_memory=False))[-1], Fault)


def test_no_local_crops_is_a_batch_of_one_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = batches(folder, stop=1)
    wanted.sizes = CropSizes(2, 24, (0.32, 1.0), 0, 16, (0.05, 0.32))
    (batch,) = list(wanted)
    assert isinstance(batch, RankBatch) and len(batch.parts[0].views) == 1


def test_micro_batches_that_do_not_divide_are_refused(folder: Path) -> None:
    with pytest.raises(Fault, match=r"4 tiles don't split into trainer\.accumulate=3"):
        batches(folder, world_size=2, accumulate=3)


def test_mask_ratios_spread_over_the_global_batch(folder: Path) -> None:
    shares = torch.cat([part.masks.flatten(1).float().mean(1) for part in load(folder, stop=1)[0].parts])
    masked = np.sort(shares[shares > 0].numpy())
    edges = np.linspace(0.1, 0.5, len(masked) + 1)
    assert (masked <= edges[1:]).all() and (masked > edges[:-1] - 5 / 64).all()  # a draw may miss by a few patches
