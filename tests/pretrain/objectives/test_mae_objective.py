"""MAE as an objective: what it masks depends on (seed, step, the tile's place), and it learns to fill in what it
doesn't see."""

import pytest
import torch

from models.mae import pixels
from pretrain.objectives.interface import Moment
from tests.pretrain.objectives.tile_objectives import batch, encoder, mae, part, unfilled_mae


def test_the_loss_is_the_mean_squared_error_on_the_masked_patches_alone() -> None:
    model = mae(norm_pix=False)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    loss, prediction, mask = model(images, noise)
    assert mask.sum(1).tolist() == [12, 12, 12]
    torch.testing.assert_close(loss, (prediction - pixels(images, 4))[mask].square().mean())


def test_a_tile_is_masked_alike_in_whatever_micro_batch_it_lies() -> None:
    model, whole = mae(), batch(6, views=(1, 0))
    with torch.no_grad():
        together = model.loss(whole, Moment(4, 10, 3))[0]
        apart = [model.loss(part(whole, first, first + 2), Moment(4, 10, 3, first))[0] for first in (0, 2, 4)]
        torch.testing.assert_close(torch.stack(apart).mean(), together)
        others = [model.loss(whole, moment)[0] for moment in (Moment(5, 10, 3), Moment(4, 10, 4), Moment(4, 10, 3, 1))]
    assert all(abs(other - together) > 1e-6 for other in others)


def test_everything_but_positions_and_the_mask_token_of_the_encoder_is_trained() -> None:
    model = mae()
    model.loss(batch(4, views=(1, 0)), Moment(0, 10, 0))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == [
        "encoder.mask_token",
        "encoder.pos_embed",
    ]
    assert set(model.trained()) == {"encoder", "decoder"} and not model.frozen()


def test_several_views_and_stochastic_depth_are_refused() -> None:
    for views in ((2, 0), (1, 2)):
        with pytest.raises(ValueError, match=r"data.crops.global_count=1 and data.crops.local_count=0"):
            mae().check_views(*views)
    with pytest.raises(ValueError, match="drop_path=0"):
        type(mae())(
            encoder(drop_path=0.1), mask_ratio=0.75, norm_pix=True, decoder_width=16, decoder_depth=1, decoder_heads=2
        )


def test_it_learns_to_continue_stripes_that_it_sees_a_quarter_of() -> None:
    """Images of one brightness each: the masked patches follow from any visible one, and predicting the mean leaves an
    error of 1."""
    model = mae(norm_pix=False)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    draw, losses = torch.Generator().manual_seed(0), []
    for _ in range(150):
        images = torch.randn(16, 1, 1, 1, generator=draw).expand(16, 3, 16, 16)
        loss, _, _ = model(images, torch.rand(16, 16, generator=draw))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.2


def test_an_encoder_with_rotary_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rotary positions are of whole grids: set model\.position_embedding=sincos"):
        unfilled_mae(encoder(position_embedding="rope"))
