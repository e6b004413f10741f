import pytest
import torch

from models.initialise import initialise
from models.longnet import Layers, LayerSettings
from models.slide_mae import SlideDecoder
from models.slide_vit import DistanceLayers, DistanceLayerSettings

KINDS = {
    "dilated": lambda: Layers(LayerSettings(8, 4, 16, (8, 32), (1, 2)), 2),
    "distance": lambda: DistanceLayers(DistanceLayerSettings(8, 4, 16, 1, "learned", (4.0,)), 2),
}


def decoder(kind: str = "dilated") -> SlideDecoder:
    network = SlideDecoder(encoder_width=16, output_width=12, width=8, layers=KINDS[kind]())
    initialise(network, seed=0)
    return network


def inputs(lengths: list[int]) -> dict:
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    mask = torch.rand(n, generator=generator) < 0.7
    mask[[sum(lengths[:i]) for i in range(len(lengths))]] = False
    visible, masked = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
    return {
        "tiles": torch.randn(len(visible), 16, generator=generator),
        "cls": torch.randn(len(lengths), 16, generator=generator),
        "visible": visible,
        "masked": masked,
        "cells": torch.randint(0, 9, (n, 2), generator=generator),
        "lengths": lengths,
        "visible_lengths": [int((~part).sum()) for part in mask.split(lengths)],
    }


def test_it_predicts_every_masked_tile():
    batch = inputs([20, 45])
    assert decoder()(**batch).shape == (len(batch["masked"]), 12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_packed_slides_equal_each_slide_alone(dtype, tolerance, kind):
    network, batch = decoder(kind).to(dtype), inputs([20, 45])
    batch |= {name: batch[name].to(dtype) for name in ("tiles", "cls")}
    packed = network(**batch)
    first_visible, first_masked = (int((batch[name] < 20).sum()) for name in ("visible", "masked"))
    alone = network(
        tiles=batch["tiles"][:first_visible],
        cls=batch["cls"][:1],
        visible=batch["visible"][:first_visible],
        masked=batch["masked"][:first_masked],
        cells=batch["cells"][:20],
        lengths=[20],
        visible_lengths=[first_visible],
    )
    torch.testing.assert_close(packed[:first_masked], alone, atol=tolerance * float(alone.detach().abs().max()), rtol=0)


def test_a_prediction_depends_on_where_it_is_and_on_every_visible_tile_before_and_after_it():
    network, batch = decoder(), inputs([12])
    batch["tiles"].requires_grad_()
    prediction = network(**batch)
    influence = torch.autograd.grad(prediction[len(prediction) // 2].sum(), batch["tiles"])[0].abs().sum(1)
    assert influence.gt(0).all()  # nothing is causal
    moved = batch | {"cells": batch["cells"] + torch.tensor([1, 0])}
    assert (network(**moved) - prediction).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_has_an_initial_value(kind):
    network, batch = decoder(kind), inputs([20, 45])
    network(**batch).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0 or "k_proj.bias" in name, name  # a bias on all keys cancels in softmax
    with pytest.raises(KeyError):
        network.initialise("decoder.nothing", torch.empty(1), torch.Generator())
