"""Crops: torchvision's rule for the box, torchvision's pixels inside it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from data.keyed import rng
from data.tiles.crops import NUMBERS_A_CROP, CropSizes, box, cut
from tests.data.shards.tile_folders import picture

SIZES = CropSizes(2, 32, (0.32, 1.0), 3, 16, (0.05, 0.32))


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers(0, 10**6))
def test_every_box_lies_inside_the_tile(height: int, width: int, a: float, b: float, sample: int) -> None:
    top, left, h, w = box(
        height, width, (min(a, b), max(a, b)), (3 / 4, 4 / 3), rng(0, sample).random(NUMBERS_A_CROP).tolist()
    )
    assert h > 0 and w > 0 and top >= 0 and left >= 0
    assert top + h <= height and left + w <= width


def test_areas_and_aspects_stay_in_their_ranges_and_fill_them() -> None:
    drawn = rng(0, "boxes").random((2000, NUMBERS_A_CROP)).tolist()
    boxes = np.array([box(256, 256, (0.05, 0.32), (3 / 4, 4 / 3), u) for u in drawn])
    areas, aspects = boxes[:, 2] * boxes[:, 3] / 256**2, boxes[:, 3] / boxes[:, 2]
    assert 0.048 < areas.min() < 0.06 and 0.31 < areas.max() < 0.325  # sides are rounded to pixels
    assert 0.74 < aspects.min() < 0.78 and 1.28 < aspects.max() < 1.36
    assert abs(areas.mean() - (0.05 + 0.32) / 2) < 4 * (0.27 / math.sqrt(12)) / math.sqrt(2000)
    assert abs(np.log(aspects).mean()) < 4 * (2 * math.log(4 / 3) / math.sqrt(12)) / math.sqrt(2000)


def test_places_are_uniform_and_reach_both_edges() -> None:
    drawn = rng(1, "boxes").random((2000, NUMBERS_A_CROP)).tolist()
    places = np.array([box(20, 14, (0.36, 0.36), (1.0, 1.0), u)[:2] for u in drawn])  # 10 × 10 of 20 × 14
    for values, count in zip(places.T, (11, 5), strict=True):
        often = np.bincount(values, minlength=count)
        assert len(often) == count and np.abs(often - 2000 / count).max() < 5 * np.sqrt(2000 / count)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 300, (0, 83, 100, 133)), (300, 100, (83, 0, 133, 100)), (100, 110, (0, 0, 100, 110))],
)
def test_where_no_box_fits_the_largest_central_one_is_taken(
    height: int, width: int, expected: tuple[int, int, int, int]
) -> None:
    assert box(height, width, (4.0, 5.0), (3 / 4, 4 / 3), rng(0).random(NUMBERS_A_CROP).tolist()) == expected


TURNING = replace(SIZES, vertical_flip=0.5, quarter_turns=0.75)
CONTEXT = CropSizes(2, 32, (0.9, 1.1), 3, 16, (0.9, 1.1), (0.95, 1.05), "crop", vertical_flip=0.5)  # Virchow2's


@pytest.mark.parametrize("sizes", [SIZES, TURNING, CONTEXT], ids=["DINOv2", "turning", "extended context"])
def test_views_are_torchvisions_antialiased_bicubic_crops_flips_and_turns(sizes: CropSizes) -> None:
    tile = picture(0, 96)
    image = torch.from_numpy(tile).permute(2, 0, 1)
    turns = set()
    for sample in range(10):
        drawn = rng(5, "crops", sample).random((5, NUMBERS_A_CROP)).tolist()
        for view, (side, scale), u in zip(cut(tile, sizes, 5, sample), sizes.views(), drawn, strict=True):
            top, left, h, w = box(96, 96, sizes.areas(side, scale, 96, 96), sizes.aspect, u)
            expected = reference.resized_crop(
                image, top, left, h, w, [side, side], InterpolationMode.BICUBIC, antialias=True
            )
            if u[-3] < 0.5:
                expected = reference.horizontal_flip(expected)
            if u[-2] < sizes.vertical_flip:
                expected = reference.vertical_flip(expected)
            if u[-1] < sizes.quarter_turns:
                turns.add(turn := 1 + int(3 * u[-1] / sizes.quarter_turns))
                expected = reference.rotate(expected, 90 * turn)
            assert view.dtype == torch.uint8 and view.shape == (3, side, side)
            assert (view.int() - expected.int()).abs().max() <= 1
    assert turns == ({1, 2, 3} if sizes.quarter_turns else set())


def test_shrinking_a_fine_pattern_gives_its_mean_not_its_aliases() -> None:
    board = ((np.indices((128, 128)).sum(0) % 2) * 255).astype(np.uint8)[..., None].repeat(3, -1)
    for view in cut(board, CropSizes(4, 16, (0.9, 1.0), 0, 8, (0.1, 0.2)), 0, 0):
        inner = view[:, 2:-2, 2:-2].float()
        assert (inner - 127.5).abs().max() < 16


def test_views_depend_on_seed_and_sample_alone() -> None:
    tile = picture(1)
    same = zip(cut(tile, SIZES, 0, 3), cut(tile.copy(), SIZES, 0, 3), strict=True)
    assert all(torch.equal(one, other) for one, other in same)
    assert not torch.equal(cut(tile, SIZES, 0, 3)[0], cut(tile, SIZES, 0, 4)[0])
    assert not torch.equal(cut(tile, SIZES, 0, 3)[0], cut(tile, SIZES, 1, 3)[0])


def test_half_of_the_views_are_mirrored() -> None:
    tile = np.zeros((64, 64, 3), dtype=np.uint8)
    tile[:, 32:] = 255
    whole = CropSizes(1, 16, (1.0, 1.0), 0, 8, (0.1, 0.2), aspect=(1.0, 1.0))
    mirrored = sum(int(cut(tile, whole, 0, sample)[0][0, 8, 0] > 127) for sample in range(400))
    assert abs(mirrored - 200) < 4 * 10


def test_no_local_crops_is_a_setting() -> None:
    assert len(cut(picture(0), CropSizes(2, 16, (0.3, 1.0), 0, 8, (0.1, 0.3)), 0, 0)) == 2
