"""The slide ViT: places count by distance alone, slides by themselves, and every parameter learns."""

import pytest
import torch

from models.distance_attention import alibi_slopes
from models.initialise import initialise
from models.slide_vit import SlideViT

SMALL = {
    "input_width": 12,
    "width": 16,
    "depth": 2,
    "heads": 4,
    "feed_forward_width": 24,
    "registers": 2,
    "slopes": "learned",
    "reach": [4.0],
    "dropout": 0.2,
    "drop_path": 0.5,
}


def small(**changes) -> SlideViT:
    network = SlideViT(**SMALL | changes)
    initialise(network, seed=0)
    return network


def slides(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    draw = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.arange(n) for n in lengths])
    return torch.randn(sum(lengths), 12, generator=draw), torch.stack([numbers % 9, numbers // 9], 1), lengths


@pytest.mark.parametrize("seeds", [None, [5, 6, 7]])
def test_a_slide_has_the_same_features_whatever_it_is_packed_with_dropout_too(seeds):
    network, (tokens, cells, lengths) = small(), slides([40, 1, 23])
    packed = network(tokens, cells, lengths, seeds, all_layers=True)
    assert packed.cls_layers.shape == packed.pooled_layers.shape == (3, 3, 16)
    for number, (some, at) in enumerate(zip(tokens.split(lengths), cells.split(lengths), strict=True)):
        alone = network(some, at, [len(some)], seeds and seeds[number : number + 1], all_layers=True)
        for name in ("cls", "pooled", "cls_layers", "pooled_layers"):
            together = getattr(packed, name)[..., number : number + 1, :]
            torch.testing.assert_close(together, getattr(alone, name), atol=2e-6, rtol=0)
        torch.testing.assert_close(packed.tiles.split(lengths)[number], alone.tiles, atol=2e-6, rtol=0)


def test_only_distances_count_shifts_turns_and_the_order_of_tiles_change_nothing():
    network, (tokens, cells, lengths) = small(), slides([50])
    found = network(tokens, cells, lengths)
    turned = torch.stack([300 - cells[:, 1], cells[:, 0] - 40], 1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    again = network(tokens[order], turned[order], lengths)
    torch.testing.assert_close(again.tiles, found.tiles[order], atol=2e-6, rtol=0)
    torch.testing.assert_close(again.cls, found.cls, atol=2e-6, rtol=0)
    assert (network(tokens, cells * 2, lengths).cls - found.cls).abs().max() > 1e-6


def test_pieces_without_gradients_give_what_training_gives(monkeypatch):
    monkeypatch.setattr("models.longnet.PIECE", 7)
    network, given = small(), slides([40, 23])
    trained = network(*given)
    with torch.no_grad():
        torch.testing.assert_close(network(*given).tiles, trained.tiles, atol=2e-6, rtol=0)


def test_every_parameter_learns_and_has_an_initial_value():
    network, (tokens, cells, lengths) = small(), slides([40, 23])
    masked = torch.arange(63) % 3 == 0
    found = network(tokens, cells, lengths, masked=masked)
    (found.tiles.square().sum() + found.cls[:, 0].sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    slopes = network.encoder.blocks[1].log_slopes.exp()
    torch.testing.assert_close(slopes, alibi_slopes(4))
    assert 0 < network.cls_token.std() < 1e-5 and network.mask_token.eq(0).all()
    with pytest.raises(KeyError):
        network.initialise("encoder.nothing", torch.empty(1), torch.Generator())


def test_blocks_that_begin_as_the_identity_hand_their_input_through():
    network, given = small(initial_residual=0.0), slides([30])
    found = network(*given, all_layers=True)
    torch.testing.assert_close(found.pooled_layers[0], found.pooled_layers[2], atol=0, rtol=0)


def test_means_leave_out_cells_without_a_tile():
    network, (tokens, cells, lengths) = small(), slides([40, 23])
    valid = torch.arange(63) % 4 > 0
    found = network(tokens, cells, lengths, valid=valid, all_layers=True)
    kept = network(tokens[valid], cells[valid], [30, 17], all_layers=True)
    for name in ("cls", "pooled", "cls_layers", "pooled_layers"):
        torch.testing.assert_close(getattr(found, name), getattr(kept, name), atol=2e-6, rtol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="not divisible by heads 3"):
        small(heads=3)
    with pytest.raises(ValueError, match="one for each of the 4"):
        small(reach=[1.0, 2.0])
    tokens, cells, _ = slides([10])
    with pytest.raises(ValueError, match="do not agree"):
        small()(tokens, cells, [9])
    small().encoder.share_slides(None)
    with pytest.raises(ValueError, match="can't share a slide"):
        small().encoder.share_slides(object())
