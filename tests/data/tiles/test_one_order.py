"""One order: the global batches are the same whoever loads them, in however many pieces, from whatever source.

A run is cut at random into segments, each loaded by a random number of ranks with a random number of threads, all made
anew as after a kill. Tile numbers, pixels of all crops (so their boxes), colour parameters and masks are compared
with those of one rank that was never interrupted.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.masks import Masking
from data.tiles.augment_parameters import Colour
from data.tiles.crops import CropSizes
from data.tiles.loader import RankBatch, TileBatches
from data.tiles.mixture import Mixture
from data.tiles.of_shards import ShardTiles
from data.tiles.of_slides import SlideTiles
from data.tiles.source import TileSource
from data.tiles.stream import Stream, group_size
from tests.data.shards.tile_folders import write_tiles
from tests.data.tiles.test_chosen_tiles import choose, write_sample
from tests.data.tiles.test_loader import by_tile, same
from tests.data.tiles.test_slide_tiles import look, write_slides

SIZES = CropSizes(2, 16, (0.32, 1.0), 2, 8, (0.05, 0.32))
SHAPE = {"batch_size": 16, "lanes": 8}
STEPS = 6
ORDERS = {
    "shards": None,
    "one slide a lane": 1,
    "mixture": None,
    "slides online": None,
    "mixture of groups": 1,
    "chosen of a mixture": None,
    "chosen, one slide a lane": 1,
}
SEGMENTS = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4)), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TileSource]:
    """Each source by name, opened anew every time."""
    folder = tmp_path_factory.mktemp("one-order")
    few, more = write_tiles(folder / "few", [19]), write_tiles(folder / "more", [23, 11, 14])
    slides = write_slides(folder / "slides")
    look(slides, folder / "grids")
    table = write_sample(folder / "sample.parquet", range(34), [n % 4 for n in range(34)], slide=["slide0"] * 34)

    def source(name: str) -> TileSource:
        group = group_size(**SHAPE, slides_per_lane=ORDERS[name])
        shards = ShardTiles(group, shards=[str(more)])
        if name in ("shards", "one slide a lane"):
            return shards
        online = SlideTiles(look(slides, folder / "grids"), group)
        if name == "slides online":
            return online
        if name == "chosen, one slide a lane":
            return choose(shards, table, group)
        if name == "chosen of a mixture":
            return choose(Mixture({"few": (ShardTiles(shards=[str(few)]), 1), "more": (shards, 2)}), table)
        return Mixture({"few": (ShardTiles(group, shards=[str(few)]), 1), "more": (shards, 2), "online": (online, 1.5)})

    return source


def load(source: TileSource, name: str, start: int, stop: int, rank: int, world: int, threads: int) -> list[RankBatch]:
    stream = Stream(source.parts, **SHAPE, window=2, seed=3, slides_per_lane=ORDERS[name])  # type: ignore[arg-type]
    found = list(
        TileBatches(
            source,
            stream,
            SIZES,
            Colour(stain_probability=0.3, stain_shift=0.05),
            Masking(0.5, 0.1, 0.5, 4),
            seed=3,
            start=start,
            stop=stop,
            rank=rank,
            world_size=world,
            accumulate=1,
            threads=threads,
        )
    )
    assert all(isinstance(batch, RankBatch) and not batch.bad for batch in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("examples", [5, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ORDERS)
def test_any_interruptions_world_sizes_and_threads_give_the_uninterrupted_batches(
    name: str, examples: int, make: Callable[[str], TileSource]
) -> None:
    whole = cache(lambda: [by_tile(batch.parts) for batch in load(make(name), name, 0, STEPS, 0, 1, 1)])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(SEGMENTS)
    def check(segments: list[tuple[int, int, int]]) -> None:
        step = 0
        for length, world, threads in segments:
            stop = min(step + length, STEPS)
            ranks = [load(make(name), name, step, stop, rank, world, threads) for rank in range(world)]
            for at in range(stop - step):
                parts = [part for rank in ranks for part in rank[at].parts]
                assert same(by_tile(parts), whole()[step + at])
            step = stop

    check()


def test_the_masks_are_stratified_over_the_global_batch_of_any_world(make: Callable[[str], TileSource]) -> None:
    for world in (1, 8):
        masks = torch.cat(
            [load(make("shards"), "shards", 0, 1, rank, world, 1)[0].parts[0].masks for rank in range(world)]
        )
        shares = np.sort(masks.flatten(1).float().mean(1).numpy())
        assert (shares == 0).sum() == 16 and len(shares) == 32


def test_a_pass_of_a_mixtures_member_reads_each_of_its_tiles_once(make: Callable[[str], TileSource]) -> None:
    """Counted on what the loader hands over: lane after lane, until each has gone through the small member."""
    source = make("mixture")
    batches = load(source, "mixture", 0, 14, 0, 1, 4)
    numbers = (
        torch.stack([batch.parts[0].numbers for batch in batches]).reshape(14, 8, 2).transpose(0, 1).reshape(8, 28)
    )
    seen = [numbers[lane][numbers[lane] < 19] for lane in range(8)]
    lengths = [(lane + 1) * 19 // 8 - lane * 19 // 8 for lane in range(8)]
    first_pass = torch.cat([mine[:length] for mine, length in zip(seen, lengths, strict=True)])
    assert sorted(first_pass.tolist()) == list(range(19))


def test_a_bad_file_is_replaced_within_its_member(make: Callable[[str], TileSource], tmp_path: Path) -> None:
    one, two = write_tiles(tmp_path / "one", [20, 10]), write_tiles(tmp_path / "two", [30])
    source = Mixture({"one": (ShardTiles(shards=[str(one)]), 1), "two": (ShardTiles(shards=[str(two)]), 1)})
    stream = Stream(source.parts, **SHAPE, window=2, seed=0)
    wanted = np.concatenate([stream.batch(step) for step in range(8)])
    (one / "tiles-000001.tar").unlink()
    batches = TileBatches(
        source,
        stream,
        SIZES,
        Colour(),
        Masking(0.5, 0.1, 0.5, 4),
        seed=0,
        start=0,
        stop=8,
        rank=0,
        world_size=1,
        accumulate=1,
        threads=2,
    )
    loaded = [batch for batch in batches if isinstance(batch, RankBatch)]
    got = np.concatenate([batch.parts[0].numbers.numpy() for batch in loaded])
    lost = (wanted >= 20) & (wanted < 30)
    assert lost.any() and np.array_equal(got[~lost], wanted[~lost]) and (got[lost] < 20).all()
    assert len({int(number) for number in got[lost]}) > 3, "a lost tar's tiles are all replaced by one"
    assert sum(len(batch.bad) for batch in loaded) == lost.sum()
