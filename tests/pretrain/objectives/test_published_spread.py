"""OpenMidnight's term as published, beside the corrected one."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.spread import SPREADS, kde, kde_as_published


def test_the_published_term_is_the_negative_log_of_the_kernel_sum_self_pairs_included() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = F.normalize(x, dim=-1)
    by_hand = -torch.stack([torch.exp(5 * unit @ unit[i]).sum().log() for i in range(6)]).mean()
    torch.testing.assert_close(kde_as_published(x, 6), by_hand)


@pytest.mark.parametrize(("name", "spreads"), [("kde", True), ("sigreg", True), ("kde_as_published", False)])
def test_minimised_alone_the_published_sign_pulls_features_together(name: str, spreads: bool) -> None:
    x = (torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) + 1.0).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.05)
    for step in range(200):
        optimiser.zero_grad()
        SPREADS[name](x, 32, Moment(step, 200, seed=0), 5.0).backward()
        optimiser.step()
    unit = F.normalize(x.detach(), dim=-1)
    cosine = float((unit @ unit.T)[~torch.eye(32, dtype=torch.bool)].mean())
    assert cosine < 0.1 if spreads else cosine > 0.95


def test_both_leave_nothing_between_groups() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for loss in (kde, kde_as_published):
        torch.testing.assert_close(loss(x, 4), (loss(x[:4], 4) + loss(x[4:], 4)) / 2)
