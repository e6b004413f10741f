"""What pathology recipes add to DINOv2's views: stain shifts, extended-context translation, vertical flips."""

import numpy as np
import pytest
import torch
from skimage.color import hed2rgb, rgb2hed

from data.keyed import rng
from data.tiles import augment as ours
from data.tiles.augment_parameters import FACTORS, ORDER, SCALES, STAIN, STAINS, WIDTH, Colour, draw_parameters
from data.tiles.crops import CropSizes, cut


def test_shifted_stains_equal_scikit_images() -> None:
    images = torch.from_numpy(rng(0, "pixels").random((3, 3, 8, 8), dtype=np.float32))
    images[0, :, 0, 0], images[0, :, 0, 1] = 1.0, 0.0  # white and black
    shift = torch.tensor([[0.05, -0.03, 0.02], [-0.05, 0.01, 0.0], [0.0, 0.0, 0.0]])
    scale = torch.tensor([[1.0, 1.0, 1.0], [0.9, 1.2, 1.0], [1.0, 1.0, 1.0]])
    found = ours.shift_stains(images, shift, scale)
    for image, amount, factor, result in zip(images.double(), shift.double(), scale.double(), found, strict=True):
        stains = (rgb2hed(image.permute(1, 2, 0).numpy()) * factor.numpy() + amount.numpy()).clip(0, 1)
        np.testing.assert_allclose(result.permute(1, 2, 0).numpy(), hed2rgb(stains), atol=2e-6)


def test_only_the_images_that_were_drawn_are_shifted() -> None:
    images = torch.from_numpy(rng(1).integers(30, 250, (4, 3, 6, 6), dtype=np.uint8))
    rows = torch.zeros(4, WIDTH)
    rows[:, FACTORS], rows[:, ORDER] = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.arange(4.0)
    rows[[0, 2], STAIN], rows[:, STAINS], rows[:, SCALES] = 1.0, torch.tensor([0.05, 0.05, -0.05]), 1.1
    found = ours.augment(images, rows, torch.zeros(3), torch.ones(3))
    changed = (found - images / 255).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [True, False, True, False]
    torch.testing.assert_close(found[2], ours.shift_stains(images[2:3] / 255, rows[2:3, STAINS], rows[2:3, SCALES])[0])


def test_drawn_shifts_follow_their_settings_and_change_no_other_draw() -> None:
    colour = Colour(stain_probability=0.5, stain_shift=0.05)
    table = draw_parameters(colour, np.zeros(2000, dtype=int), rng(0))
    assert abs(table[:, STAIN].mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)
    shifts = table[:, STAINS]
    assert -0.05 <= shifts.min() < -0.0495 and 0.0495 < shifts.max() <= 0.05 and abs(shifts.mean()) < 0.002
    without = draw_parameters(Colour(), np.zeros(2000, dtype=int), rng(0))
    assert np.array_equal(without[:, :STAIN], table[:, :STAIN]) and not without[:, STAIN].any()
    assert (table[:, SCALES] == 1).all()


def test_normal_shifts_and_factors_have_their_deviation_and_change_no_other_draw() -> None:
    plain, colour = (Colour(stain_probability=1.0, stain_sigma=sigma) for sigma in (0.0, 0.12))
    before, table = (draw_parameters(settings, np.zeros(2000, dtype=int), rng(0)) for settings in (plain, colour))
    assert np.array_equal(before[:, : STAINS.start], table[:, : STAINS.start])
    for columns, mean in ((STAINS, 0), (SCALES, 1)):
        drawn = table[:, columns]
        assert np.abs(drawn.mean(0) - mean).max() < 0.01 and drawn.std(0) == pytest.approx([0.12] * 3, rel=0.1)
    assert np.abs(np.corrcoef(np.concatenate([table[:, STAINS], table[:, SCALES]], 1).T) - np.eye(6)).max() < 0.1


def coordinates(side: int) -> np.ndarray:
    """A tile whose red is its row and whose green is its column, halved, so that a crop shows where it was cut."""
    rows, columns = np.mgrid[:side, :side] // 2
    return np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)


def test_extended_context_moves_over_the_region_and_hardly_resizes() -> None:
    sizes = CropSizes(1, 224, (0.9, 1.1), 1, 98, (0.9, 1.1), (0.95, 1.05), "crop")
    extents, lefts = [], []
    for sample in range(150):
        for view in cut(coordinates(392), sizes, 0, sample):
            side = view.shape[-1]
            red, green = view[0].float() * 2, view[1].float() * 2
            extents.append([(red[-2, 5] - red[1, 5]) / (side - 3), (green[5, 1] - green[5, -2]).abs() / (side - 3)])
            if side == 224:
                lefts.append(float(green.min()))
    scales = torch.tensor(extents)
    # Both sides are the crop's own times .9–1.1 times at most √1.05; the steps of two grey levels blur it a little.
    assert 0.9 / 1.05**0.5 - 0.03 < scales.min() < 0.93 and 1.07 < scales.max() < 1.1 * 1.05**0.5 + 0.03
    assert min(lefts) < 12 and max(lefts) > 392 - 1.1 * 224 - 30  # all over the region


def test_relative_to_the_tile_the_same_numbers_are_shares_of_its_area() -> None:
    sizes = CropSizes(1, 32, (0.25, 0.25), 0, 16, (0.05, 0.32), (1.0, 1.0))
    assert sizes.areas(32, (0.25, 0.25), 64, 64) == (0.25, 0.25)
    assert CropSizes(1, 32, (1.0, 1.0), 0, 16, (1.0, 1.0), relative_to="crop").areas(32, (1.0, 0.5), 64, 64) == (
        0.25,
        0.0625,
    )


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_vertical_flips_come_as_often_as_asked(probability: float) -> None:
    sizes = CropSizes(1, 32, (1.0, 1.0), 0, 16, (0.05, 0.32), (1.0, 1.0), vertical_flip=probability)
    tile = np.repeat(np.linspace(0, 250, 32).astype(np.uint8)[:, None, None], 32, 1).repeat(3, 2)
    upside_down = np.mean([bool(cut(tile, sizes, 0, sample)[0][0, 0, 0] > 100) for sample in range(400)])
    assert abs(upside_down - probability) <= 4 * np.sqrt(probability * (1 - probability) / 400)


def test_turned_and_mirrored_views_are_the_eight_symmetries_equally_often() -> None:
    sizes = CropSizes(1, 8, (1.0, 1.0), 0, 16, (0.05, 0.32), (1.0, 1.0), vertical_flip=0.5, quarter_turns=0.75)
    tile = np.zeros((8, 8, 3), dtype=np.uint8)
    tile[:4, :4], tile[:4, 4:], tile[4:, :4] = 240, 160, 80
    found: dict[tuple[int, ...], int] = {}
    for sample in range(1600):
        view = cut(tile, sizes, 0, sample)[0][0]
        corners = tuple(int(view[row, column]) // 60 for row in (1, -2) for column in (1, -2))
        found[corners] = found.get(corners, 0) + 1
    assert len(found) == 8 and max(abs(often - 200) for often in found.values()) < 5 * np.sqrt(200)


def test_quarter_turns_come_as_often_as_asked_and_turn_whole_views() -> None:
    plain = CropSizes(2, 16, (0.3, 1.0), 2, 8, (0.05, 0.32))
    turning = CropSizes(2, 16, (0.3, 1.0), 2, 8, (0.05, 0.32), quarter_turns=0.3)
    tile = rng(0, "tile").integers(0, 255, (40, 40, 3), dtype=np.uint8)
    turns = []
    for sample in range(200):
        for before, after in zip(cut(tile, plain, 0, sample), cut(tile, turning, 0, sample), strict=True):
            turns += [turn for turn in range(4) if torch.equal(before.rot90(turn, (1, 2)), after)]
    assert len(turns) == 800
    often = np.bincount(turns, minlength=4)
    assert np.abs(often - 800 * np.array([0.7, 0.1, 0.1, 0.1])).max() < 5 * np.sqrt(800 * 0.21)
