"""The slide of a tile, told by its neighbours: which tiles are looked at, and what the figure says."""

from pathlib import Path

import numpy as np
import openslide
import pytest
import simplejpeg
import torch
from torch import Tensor, nn

from data.keyed import rng
from data.shards.scan import scan
from data.tiles.mixture import Mixture
from data.tiles.of_shards import ShardTiles
from data.tiles.source import TileSource, UnreadableTile
from data.tiles.stream import Part
from launch.entry import run_command_line
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.run.metrics import read_metrics
from pretrain.training.slide_sample import FEWEST_OF_A_SLIDE, SLIDES, TILES, SlideSample, choose, recognised, run_of
from tests.data.shards.tars import tile_members, write_tar


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
    assert len(found) == 2 * TILES and sum(number < 40 for number in found) == TILES >= FEWEST_OF_A_SLIDE


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


def scanned(pixels: np.ndarray, scanner: int) -> np.ndarray:
    """What the second of two scanners makes of colours: another gamma for each channel."""
    return pixels if scanner == 0 else (255 * (pixels / 255) ** np.array([1.6, 1.0, 0.7])).astype(np.uint8)


def write_halves(regions: Path, folder: Path, side: int = 100) -> Path:
    """Each region (1000 × 1000) as two slides: its left half as one scanner shows it, its right half as another. One
    tar a slide."""
    for path in sorted(regions.glob("*.tiff")):
        with openslide.OpenSlide(path) as opened:
            pixels = np.array(opened.read_region((0, 0), 0, (1000, 1000)).convert("RGB"))
        for half in (0, 1):
            slide = f"{path.stem}-{half}"
            members = []
            for x in range(500 * half, 500 * half + 500, side):
                for y in range(0, 1000, side):
                    tile = np.ascontiguousarray(scanned(pixels[y : y + side, x : x + side], half))
                    members += tile_members(simplejpeg.encode_jpeg(tile, quality=95), slide, x, y, side, mpp=0.25)
            write_tar(folder / f"{slide}.tar", members)
    scan(folder)
    return folder


@pytest.mark.slow
def test_what_dinov2_s_colour_trains_tells_slides_less_than_what_no_colour_trains(shared: Path, tmp_path: Path) -> None:
    """Published recipes differ in colour, and the logged figure shows it: both halves of a region are alike but for the
    scanner."""
    tiles = write_halves(shared / "slides" / "regions", tmp_path / "tiles")
    weak = [f"data.colour.{part}=0" for part in ("brightness", "contrast", "saturation", "hue", "grey_probability")]
    found: dict[str, list[float]] = {"strong": [], "weak": []}
    for name, settings in (("strong", []), ("weak", weak)):
        for seed in (0, 1):
            run = tmp_path / f"{name}{seed}"
            run_command_line(
                [
                    "tile",
                    "recipe=small",
                    f"run={run}",
                    f"data.shards={tiles}",
                    f"seed={seed}",
                    "optim.steps=800",
                    "watch.every=100",
                    "data.batch_size=16",
                    "data.threads=1",
                    "trainer.accelerator=cpu",
                    "model.image_size=48",
                    "model.width=96",
                    "model.depth=3",
                    "model.feed_forward_width=192",
                    "data.crops.global_size=48",
                    "data.crops.local_size=32",
                    "data.crops.local_count=2",
                    *settings,
                ]
            )
            looks = [row["slide_knn"] for row in read_metrics(run) if "slide_knn" in row]
            found[name] += looks[len(looks) // 2 :]  # of 256 tiles each
    assert np.mean(found["strong"]) < np.mean(found["weak"]) - 0.03, found
