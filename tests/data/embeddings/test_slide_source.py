"""Slides read directly for embedding."""

from pathlib import Path

import numpy as np

from data.embeddings.sources import SlideSource
from data.fault import Fault
from data.slides.mpp import SlidesMpp
from data.slides.tiling import TilingSettings
from data.slides.tissue import saturated_share, tissue_needed
from tests.data.slides.synthetic_slides import stained, write_slide


def test_a_slide_that_vanishes_once_its_tissue_is_found_is_a_fault_of_each_of_its_tiles(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tiff", stained(512, 512, [(256, 256, 200)]), 0.5)
    source = SlideSource({path: "s"}, TilingSettings(0.5, 128, tissue_needed(["otsu"], [0.1])), SlidesMpp())
    tiles = source.open("s")
    assert all(isinstance(tile, np.ndarray) for tile in tiles.read(np.arange(3)))
    tiles.close()
    path.unlink()
    gone = tiles.read(np.arange(3))
    assert all(isinstance(tile, Fault) and "no such file" in str(tile) for tile in gone)


def test_a_pale_tile_is_none_as_an_empty_one_is(tmp_path: Path) -> None:
    image = stained(256, 512, [(256, 128, 600)])
    image[:, :256] = image[:, :256].mean(axis=2, keepdims=True)
    path = write_slide(tmp_path / "s.tiff", image, 0.5)
    settings = TilingSettings(0.5, 128, tissue_needed(["gigapath"], [0.0]), min_saturated=0.5)
    tiles = SlideSource({path: "s"}, settings, SlidesMpp()).open("s")
    read = tiles.read(np.arange(8))
    assert [tile is None for tile in read] == [True, True, False, False] * 2
    assert all(isinstance(tile, np.ndarray) and saturated_share(tile) > 0.9 for tile in read if tile is not None)
    tiles.close()
