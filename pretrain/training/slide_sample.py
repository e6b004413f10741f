"""Do features recognise slides rather than tissue? Some tiles of some slides of the run's own data, looked at again and
again.

``slide_knn``: the accuracy with which the neighbours of a tile, itself left out, tell its slide. It needs no labels.
Stain, scanner and focus are the same all over a slide, so it is high where features keep them: ``slide_chance`` is that
of a guess. It never falls to that, since a slide's tissue is alike too; what matters is whether it rises, and how
recipes differ on the same tiles.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn

from data.fault import Fault
from data.keyed import rng
from data.tiles.source import TileSource, UnreadableTile
from pretrain.encoders.preprocessing import Preprocessing
from pretrain.probing.scores import knn_predict
from pretrain.training.fixed_images import BetweenBatches, FixedImages, agreed

SLIDES, TILES = 16, 16  # at most so many slides, and of each so many tiles
FEWEST_OF_A_SLIDE = 4  # tiles of a slide that is looked at
NEIGHBOURS_ASKED = 10
CANDIDATES = 4096
DRAWS_TRIED = 8


class SlideSample:
    """Tiles of ``source``, drawn from the seed; `chosen` holds none where fewer than two slides have enough tiles, or
    none is known."""

    def __init__(self, source: TileSource, seed: int) -> None:
        self.source, self.chosen = source, choose(source, seed)
        names = [source.slide(number) for number in self.chosen]
        self.slides = np.unique([str(name) for name in names], return_inverse=True)[1] if names else np.empty(0, int)

    def load(self, preprocessing: Preprocessing, rank: int, world_size: int) -> None:
        """Read this rank's share of the tiles. Raises Fault where one and those behind it can't be read."""
        self.images = FixedImages(len(self.chosen), self._read, preprocessing, rank, world_size)

    def _read(self, which: int) -> np.ndarray:
        number = self.chosen[which]
        for _ in range(DRAWS_TRIED):
            try:
                return self.source.read(number)
            except UnreadableTile as error:
                said, number = str(error), error.next % len(self.source)
        raise Fault(f"{said}, nor can {DRAWS_TRIED - 1} others that were tried in its place")

    def score(
        self, encoder: nn.Module, device: torch.device, between: BetweenBatches = lambda batches, _: batches
    ) -> dict[str, float]:
        """``slide_knn`` and ``slide_chance``; every rank calls it and gets the same numbers."""
        return agreed(recognised(self.images.features(encoder, device, between), self.slides), device)


def recognised(features: Tensor, slides: np.ndarray) -> dict[str, float]:
    """Whether the ten nearest of the others tell the slide of each of n tiles: features (n, width), slides (n,) from
    0."""
    values, counts = features.cpu().numpy(), np.bincount(slides)
    found = knn_predict(values, slides, values, len(counts), k=NEIGHBOURS_ASKED, itself=False)
    return {"slide_knn": float((found == slides).mean()), "slide_chance": float(counts.max() / counts.sum())}


def choose(source: TileSource, seed: int) -> list[int]:
    """Tile numbers, `TILES` of each of `SLIDES` slides where there are so many: of the runs in which slides lie one
    after the other, or of tiles drawn at random where they lie mixed."""
    draw, count = rng(seed, "slide sample"), len(source)
    chosen: dict[str, list[int]] = {}
    for anchor in draw.integers(count, size=8 * SLIDES):
        name = source.slide(int(anchor))
        if name is None or name in chosen or len(chosen) == SLIDES:
            continue
        first, last = run_of(source, int(anchor))
        tiles = first + draw.permutation(last - first)[:TILES]
        if len(tiles) >= FEWEST_OF_A_SLIDE:
            chosen[name] = tiles.tolist()
    if len(chosen) < 2:
        drawn: dict[str, set[int]] = defaultdict(set)
        for number in draw.integers(count, size=CANDIDATES):
            if (name := source.slide(int(number))) is not None:
                drawn[name].add(int(number))
        most = sorted(drawn, key=lambda name: (-len(drawn[name]), name))[:SLIDES]
        chosen = {name: sorted(drawn[name])[:TILES] for name in most if len(drawn[name]) >= FEWEST_OF_A_SLIDE}
    return sorted(number for tiles in chosen.values() for number in tiles) if len(chosen) > 1 else []


def run_of(source: TileSource, number: int, most: int = 20_000) -> tuple[int, int]:
    """The first tile of the run of one slide that ``number`` lies in, and the first behind it, looked for at most so
    far away."""
    name = source.slide(number)

    def edge(step: int) -> int:
        """The last tile of the slide that way: steps that double until one is outside, then halve."""
        inside, stride = number, 1
        while (
            stride < most and 0 <= inside + step * stride < len(source) and source.slide(inside + step * stride) == name
        ):
            inside, stride = inside + step * stride, 2 * stride
        while stride > 1:
            stride //= 2
            if 0 <= inside + step * stride < len(source) and source.slide(inside + step * stride) == name:
                inside += step * stride
        return inside

    return edge(-1), edge(1) + 1
