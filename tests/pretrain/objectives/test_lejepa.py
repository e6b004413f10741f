"""LeJEPA: what SIGReg says of Gaussian and of collapsed projections, where its directions come from, and its terms."""

import pytest
import torch

from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.sigreg import (
    characteristic_means,
    drawn_directions,
    epps_pulley,
    sigreg_of_groups,
)
from tests.pretrain.objectives.tile_objectives import batch, lejepa

MOMENT = Moment(3, 10, seed=5)


def test_sigreg_is_about_one_for_a_gaussian_and_grows_with_the_samples_where_they_collapse() -> None:
    draw = torch.Generator().manual_seed(0)
    gauss, constant = torch.randn(4, 400, 24, generator=draw), torch.zeros(1, 400, 24)
    found = [
        float(epps_pulley(characteristic_means(z, drawn_directions(24, 256, MOMENT, z)), 400).mean())
        for z in (gauss, 2 * gauss, gauss + 1, constant)
    ]
    assert found[0] == pytest.approx(1.05, abs=0.15) and found[3] == pytest.approx(0.402 * 400, rel=0.01)
    assert min(found[1:3]) > 20  # too wide, and off the middle


def test_directions_are_unit_drawn_anew_each_step_and_the_same_for_every_micro_batch() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    drawn = drawn_directions(24, 64, MOMENT, like)
    assert drawn.dtype == torch.float64
    torch.testing.assert_close(drawn.norm(dim=0), torch.ones(64, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(drawn, drawn_directions(24, 64, Moment(3, 10, 5, first=8), like))
    for other in (Moment(4, 10, 5), Moment(3, 10, 6)):
        assert (drawn - drawn_directions(24, 64, other, like)).abs().max() > 0.1


def test_as_a_spread_it_acts_on_each_group_by_itself() -> None:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [sigreg_of_groups(x[i : i + 4], 4, MOMENT) for i in range(0, 12, 4)]
    torch.testing.assert_close(sigreg_of_groups(x, 4, MOMENT), torch.stack(parts).mean())


def test_prediction_is_the_squared_distance_of_every_view_to_the_mean_of_the_global_ones() -> None:
    model, seen = lejepa(sigreg_weight=0.25), batch(3)
    loss, figures = model.loss(seen, MOMENT)
    tokens = model.encoder([crops for crops, _ in seen.crops])
    z = torch.cat([model.projector(part.cls).unflatten(0, (-1, 3)) for part in tokens])
    assert z.shape == (5, 3, 8)
    centre = (z[0] + z[1]) / 2
    torch.testing.assert_close(figures["prediction"], torch.stack([(view - centre) ** 2 for view in z]).mean())
    torch.testing.assert_close(loss, 0.75 * figures["prediction"] + 0.25 * figures["sigreg"])
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
