"""Colour, blur, solarisation: torchvision's numbers for the same parameters."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from data.fault import Fault
from data.keyed import rng
from data.tiles import augment as ours
from data.tiles import augment_cpu
from data.tiles.augment_parameters import FACTORS, GREY, JITTER, ORDER, SIGMA, SOLARISE, WIDTH, Colour, draw_parameters
from tests.data.shards.tile_folders import picture

NAMES = ("brightness", "contrast", "saturation", "hue")
ZERO, ONE = torch.zeros(3), torch.ones(3)


@pytest.fixture(scope="module")
def bytes_() -> Tensor:
    noise = rng(0, "noise").integers(0, 256, (24, 24, 3), dtype=np.uint8)
    grey = np.full((24, 24, 3), 90, dtype=np.uint8)  # hue is undefined here
    black, white = np.zeros_like(grey), np.full_like(grey, 255)
    return torch.from_numpy(np.stack([picture(0, 24), picture(1, 24), noise, grey, black, white])).permute(0, 3, 1, 2)


def rows(count: int, **columns: Any) -> Tensor:
    table = torch.zeros(count, WIDTH)
    table[:, FACTORS] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    table[:, ORDER] = torch.arange(4.0)
    for name, value in columns.items():
        table[
            :,
            {"jitter": JITTER, "grey": GREY, "sigma": SIGMA, "solarise": SOLARISE, "order": ORDER, "factors": FACTORS}[
                name
            ],
        ] = torch.as_tensor(value)
    return table


@pytest.fixture(params=["each", "together"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in this file holds for a CPU's way, image by image, and for a GPU's, all together: here on a CPU."""
    if request.param == "together":

        def all_together(images: Any, rows: Any, scale: Any, offset: Any, result: Any) -> None:
            result[:] = ours.augment_together(
                torch.from_numpy(images), rows, torch.from_numpy(scale), torch.from_numpy(offset)
            )

        monkeypatch.setattr(augment_cpu, "augment_each", all_together)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("which", range(3))
def test_jitter_equals_torchvisions(which: int, factor: float, bytes_: Tensor) -> None:
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors[which] = factor
    found = ours.augment(bytes_, rows(len(bytes_), jitter=1.0, factors=factors), ZERO, ONE)
    expected = getattr(reference, f"adjust_{NAMES[which]}")(bytes_ / 255, factor)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.05, 0.1, 0.5])
def test_hue_equals_torchvisions(turns: float, bytes_: Tensor) -> None:
    factors = torch.tensor([1.0, 1.0, 1.0, turns])
    found = ours.augment(bytes_, rows(len(bytes_), jitter=1.0, factors=factors), ZERO, ONE)
    torch.testing.assert_close(found, reference.adjust_hue(bytes_ / 255, turns), atol=2e-5, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("height", [24, 5])
def test_blur_equals_torchvisions_nine_taps(sigma: float, height: int, bytes_: Tensor) -> None:
    images = bytes_[:, :, :height]
    found = ours.augment(images, rows(len(images), sigma=sigma), ZERO, ONE)
    expected = reference.gaussian_blur(images / 255, [9, 9], [sigma, sigma])
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_an_image_too_small_to_blur_is_refused_with_the_way_out(bytes_: Tensor) -> None:
    images = bytes_[:, :, :4]
    with pytest.raises(Fault, match=r"24 × 4 px are too small .*colour.blur_probability=\[0,0,0\]"):
        ours.augment(images, rows(len(images), sigma=1.0), ZERO, ONE)


def test_solarise_and_grey_equal_torchvisions_on_bytes(bytes_: Tensor) -> None:
    solarised = ours.augment(bytes_, rows(len(bytes_), solarise=1.0), ZERO, ONE)
    torch.testing.assert_close(solarised, reference.solarize(bytes_, 128) / 255, atol=1e-6, rtol=0)
    grey = ours.augment(bytes_, rows(len(bytes_), grey=1.0), ZERO, ONE)
    torch.testing.assert_close(grey, reference.rgb_to_grayscale(bytes_ / 255, 3), atol=2e-6, rtol=0)


def test_each_image_gets_its_own_parameters_in_its_own_order(bytes_: Tensor) -> None:
    orders = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1], [0, 3, 1, 2], [3, 0, 1, 2]])
    factors = torch.tensor(
        [
            [1.3, 0.7, 1.1, 0.08],
            [0.7, 1.3, 0.9, -0.05],
            [1.2, 1.2, 0.8, 0.1],
            [0.9, 0.6, 1.2, 0.02],
            [1.4, 1.4, 1.2, -0.1],
            [0.6, 0.8, 1, 0.0],
        ]
    )
    found = ours.augment(bytes_, rows(6, jitter=1.0, order=orders.float(), factors=factors), ZERO, ONE)
    for image, order, factor, result in zip(bytes_, orders, factors, found, strict=True):
        expected = image / 255
        for which in order.tolist():
            expected = getattr(reference, f"adjust_{NAMES[which]}")(expected, float(factor[which]))
        torch.testing.assert_close(result, expected, atol=5e-5, rtol=0)


def in_order(image: Tensor, row: Tensor, order: list[str]) -> Tensor:
    """One image (3, H, W) uint8 through torchvision's functions for the parameters of a row, in this order."""
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "grey": lambda x: reference.rgb_to_grayscale(x, 3),
        "blur": lambda x: reference.gaussian_blur(x, [9, 9], [float(row[SIGMA])] * 2),
        "solarise": lambda x: reference.solarize(x, 128 / 255),
        "normalise": lambda x: reference.normalize(x, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]),
    }
    drawn = {name: bool(row[column]) for name, column in (("grey", GREY), ("blur", SIGMA), ("solarise", SOLARISE))}
    x = image / 255
    for step in order:
        if step == "jitter" and row[JITTER]:
            for which in row[ORDER].int().tolist():
                x = getattr(reference, f"adjust_{NAMES[which]}")(x, float(row[FACTORS][which]))
        elif drawn.get(step, step == "normalise"):
            x = steps[step](x)
    return x


def test_a_drawn_batch_is_augmented_in_dinov2s_order_and_in_no_other(bytes_: Tensor) -> None:
    """jitter (its parts in an order of the image's own), grey, blur, solarise, normalise: as facebookresearch/dinov2's
    augmentations.py."""
    colour = Colour(blur_probability=(0.6,) * 3, solarise_probability=(0.6,) * 3, grey_probability=0.5)
    images = bytes_.repeat(6, 1, 1, 1)
    table = torch.from_numpy(draw_parameters(colour, np.ones(len(images), dtype=int), rng(4)))
    found = ours.augment(images, table, torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4]))
    order = ["jitter", "grey", "blur", "solarise", "normalise"]

    def agree(order: list[str]) -> bool:
        """All but the few pixels at which solarisation's threshold falls within rounding."""
        expected = torch.stack([in_order(image, row, order) for image, row in zip(images, table, strict=True)])
        return float(((found - expected).abs().amax(1) > 3e-4).float().mean()) < 1e-3

    assert agree(order)
    for place in range(4):
        swapped = [*order[:place], order[place + 1], order[place], *order[place + 2 :]]
        # What follows blur in linear steps commutes with it: grey before or after is the same picture.
        assert agree(swapped) == (swapped[1:3] == ["blur", "grey"])


def test_without_any_augmentation_only_normalisation_is_left(bytes_: Tensor) -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    found = ours.augment(bytes_, rows(len(bytes_)), mean, std)
    torch.testing.assert_close(found, reference.normalize(bytes_ / 255, mean.tolist(), std.tolist()))


def test_the_batch_that_came_in_is_left_as_it_was(bytes_: Tensor) -> None:
    before = bytes_.clone()
    ours.augment(bytes_, rows(len(bytes_), jitter=1.0, grey=1.0, solarise=1.0, sigma=1.0), ZERO, ONE)
    assert torch.equal(bytes_, before)


def test_an_image_does_not_depend_on_those_beside_it(bytes_: Tensor) -> None:
    images = bytes_.repeat(8, 1, 1, 1)
    colour = Colour(
        stain_probability=0.5, stain_shift=0.05, blur_probability=(0.5, 0.5, 0.5), solarise_probability=(0.3, 0.3, 0.3)
    )
    parameters = torch.from_numpy(draw_parameters(colour, np.zeros(len(images), dtype=int), rng(3)))
    together = ours.augment(images, parameters, ZERO, ONE)
    for image, row, result in zip(images, parameters, together, strict=True):
        torch.testing.assert_close(ours.augment(image[None], row[None], ZERO, ONE)[0], result, atol=1e-6, rtol=0)


def test_an_image_of_many_blocks_has_one_contrast() -> None:
    """A CPU works on blocks of pixels; the level that contrast moves to is that of the whole image."""
    image = torch.from_numpy(rng(5).integers(0, 256, (1, 3, 71, 130), dtype=np.uint8))
    image[:, :, :30] //= 4
    order, factors = torch.tensor([3.0, 0.0, 1.0, 2.0]), torch.tensor([1.2, 0.5, 1.1, 0.07])
    found = ours.augment(image, rows(1, jitter=1.0, order=order, factors=factors), ZERO, ONE)
    expected = image / 255
    for which in (3, 0, 1, 2):
        expected = getattr(reference, f"adjust_{NAMES[which]}")(expected, float(factors[which]))
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
