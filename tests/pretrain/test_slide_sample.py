"""The slide of a tile, told by its neighbours: which tiles are looked at, and what the figure says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.keyed import rng
from data.mixture import Mixture
from data.shard_tiles import ShardTiles
from data.stream import Part
from data.tile_source import TileSource, UnreadableTile
from pretrain.encoders import Preprocessing
from pretrain.slide_sample import FEWEST, SLIDES, TILES, SlideSample, choose, recognised, run_of


class Made(TileSource):
    """Tiles of one colour each, its slide's; ``order`` says the slide of each."""

    def __init__(self, order: list[int], bad: frozenset[int] = frozenset()) -> None:
        self.order, self.bad, self.digest = order, bad, "made"
        self.parts = [Part(np.array([len(order)]))]

    def name(self, number: int) -> str:
        return f"tile {number}"

    def slide(self, number: int) -> str | None:
        return f"s{self.order[number]}"

    def read(self, number: int, seed: int = 0, sample: int = 0) -> np.ndarray:
        if number in self.bad:
            raise UnreadableTile(f"tile {number} is bad", number + 1)
        return np.full((16, 16, 3), 8 * self.order[number], dtype=np.uint8)


@pytest.mark.parametrize("mixed", [False, True])
def test_as_many_tiles_of_as_many_slides_are_chosen_wherever_they_lie(mixed: bool) -> None:
    order = np.repeat(np.arange(40), 50)
    if mixed:
        order = rng(0, "mixed").permutation(order)
    source = Made(order.tolist())
    chosen = choose(source, seed=3)
    counts = np.bincount([source.order[number] for number in chosen], minlength=40)
    assert sorted(counts[counts > 0]) == [TILES] * SLIDES and len(set(chosen)) == len(chosen)
    assert choose(source, seed=3) == chosen != choose(source, seed=4)


@pytest.mark.parametrize("lengths", [[1, 30, 7], [64, 65, 1], [3], [5, 1000, 2]])
def test_the_run_of_a_slide_is_found_from_any_of_its_tiles(lengths: list[int]) -> None:
    source = Made(np.repeat(np.arange(len(lengths)), lengths).tolist())
    ends = np.cumsum(lengths)
    for number, slide in enumerate(source.order):
        assert run_of(source, number) == (ends[slide] - lengths[slide], ends[slide])


def test_nothing_is_chosen_of_one_slide_of_small_ones_or_where_no_slide_is_known(tile_shards: Path) -> None:
    assert choose(Made([0] * 100), 0) == []
    assert choose(Made(list(range(100))), 0) == []
    unknown = Made([0, 1] * 50)
    unknown.slide = lambda number: None  # type: ignore[method-assign]
    assert choose(unknown, 0) == []
    both = Mixture({"a": (Made([0] * 20), 1.0), "b": (Made([1] * 30), 1.0)})
    assert len(choose(both, 0)) == 2 * TILES
    found = choose(ShardTiles(shards=[str(tile_shards)]), 0)
    assert len(found) == 2 * TILES and sum(number < 40 for number in found) == TILES >= FEWEST


def test_slides_that_colour_tells_apart_are_recognised_and_noise_is_a_guess() -> None:
    draw = torch.Generator().manual_seed(0)
    slides = np.repeat(np.arange(8), 16)
    noise = torch.randn(128, 32, generator=draw)
    assert recognised(noise, slides)["slide_knn"] < 0.3
    told = recognised(noise + 8 * torch.randn(8, 32, generator=draw)[slides], slides)
    assert told == {"slide_knn": 1.0, "slide_chance": 0.125}


def test_a_tile_that_cannot_be_read_is_replaced_by_the_next() -> None:
    class Mean(nn.Module):
        def forward(self, crops: list[Tensor], wanted: object = None):  # type: ignore[no-untyped-def]
            class Seen:
                cls = torch.cat([crops[0].mean((2, 3)), torch.ones(len(crops[0]), 1)], dim=1)

            return [Seen]

    order = np.repeat(np.arange(4), 30).tolist()
    source = Made(order, bad=frozenset(range(0, 120, 3)))
    sample = SlideSample(source, seed=0)
    sample.load(Preprocessing(16, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), 0, 1)
    assert sample.images.count == 4 * TILES
    assert sample.score(Mean(), torch.device("cpu"))["slide_chance"] == 0.25
