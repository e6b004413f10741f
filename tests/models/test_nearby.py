import math

import pytest
import torch

from models.initialise import initialise
from models.longnet import Layers, LayerSettings
from models.nearby import LONGEST, SHORTEST, Nearby, first_reaches
from models.slide_mae import SlideDecoder


def test_it_is_the_gaussian_mean_of_the_same_slides_visible_tiles_group_by_group():
    generator = torch.Generator().manual_seed(0)
    near = Nearby(3).double()
    first_reaches(near.log_reach.data)
    lengths, wanted_lengths = [5, 1, 7], [4, 2, 3]
    x = torch.randn(13, 12, dtype=torch.float64, generator=generator)
    at, wanted = (torch.randint(0, 900, (n, 2), generator=generator) for n in (13, 9))
    at[:5], wanted[:4] = at[:5] % 6, wanted[:4] % 6  # near one another; the others are far apart, where exp underflows
    found = near(x, at, wanted, lengths, wanted_lengths)
    reaches = [SHORTEST, math.sqrt(SHORTEST * LONGEST), LONGEST]
    slides = [slice(0, 5), slice(5, 6), slice(6, 13)]
    for row, slide in enumerate(number for number, n in enumerate(wanted_lengths) for _ in range(n)):
        squared = (at[slides[slide]] - wanted[row]).square().sum(1).double()
        for group, reach in enumerate(reaches):
            weights = (-squared / (2 * reach**2)).softmax(0)
            channels = slice(4 * group, 4 * group + 4)
            torch.testing.assert_close(found[row, channels], weights @ x[slides[slide], channels], atol=1e-9, rtol=0)


def test_distances_of_a_large_slide_keep_their_precision_in_float32():
    at = torch.stack([torch.arange(1000), torch.arange(1000)], dim=1)
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    near, exact = Nearby(2), Nearby(2).double()
    for network in (near, exact):
        network.log_reach.data.fill_(math.log(SHORTEST))
    found = near(x, at, at + torch.tensor([0, 1]), [1000], [1000])
    torch.testing.assert_close(
        found.double(), exact(x.double(), at, at + torch.tensor([0, 1]), [1000], [1000]), atol=0.03, rtol=0
    )


def test_the_reaches_learn_and_a_decoder_gives_them_their_first_values():
    layers = Layers(LayerSettings(8, 2, 16, (8,), (1,)), 1)
    settings = {"encoder_width": 8, "output_width": 4, "width": 8, "layers": layers}
    decoder = SlideDecoder(**settings, start="nearby")
    initialise(decoder, seed=0)
    torch.testing.assert_close(decoder.nearby.log_reach.exp(), torch.tensor([SHORTEST, LONGEST]))
    cells = torch.tensor([[i % 5, i // 5] for i in range(20)])
    visible, masked = torch.arange(0, 20, 3), torch.tensor([i for i in range(20) if i % 3])
    tiles = torch.randn(len(visible), 8, generator=torch.Generator().manual_seed(0))
    decoder(tiles, torch.zeros(2, 8), visible, masked, cells, [9, 11], [3, 4]).square().sum().backward()
    assert decoder.nearby.log_reach.grad.abs().min() > 0
    with pytest.raises(ValueError, match="'token' or 'nearby', not 'far'"):
        SlideDecoder(**settings, start="far")
