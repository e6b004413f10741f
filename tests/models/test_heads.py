"""The prototype head."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

from models.heads import PrototypeHead, WeightNormLinear
from models.initialise import initialise


def test_weight_norm_equals_torchs_values_and_gradients() -> None:
    ours = WeightNormLinear(6, 9)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ours.weight_v.normal_(generator=generator)
        ours.weight_g.uniform_(0.5, 2, generator=generator)
    theirs = weight_norm(torch.nn.Linear(6, 9, bias=False))
    with torch.no_grad():
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
    x = torch.randn(4, 6, generator=generator)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).sin().sum().backward()
    theirs(x).sin().sum().backward()
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)


def test_scores_are_cosines_with_the_prototypes_at_the_start() -> None:
    head = PrototypeHead(8, prototypes=12, bottleneck=5, hidden=16, layers=3)
    initialise(head, 0)
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    scores = head(x)
    expected = F.normalize(head.mlp(x), dim=-1) @ F.normalize(head.last_layer.weight_v, dim=-1).T
    torch.testing.assert_close(scores, expected)
    assert scores.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("layers", "linears"), [(1, [(8, 5)]), (2, [(8, 16), (16, 5)]), (4, [(8, 16), (16, 16), (16, 16), (16, 5)])]
)
def test_the_number_of_layers_counts_the_linears_before_the_prototypes(
    layers: int, linears: list[tuple[int, int]]
) -> None:
    head = PrototypeHead(8, prototypes=12, bottleneck=5, hidden=16, layers=layers)
    found = [(m.in_features, m.out_features) for m in head.mlp if isinstance(m, torch.nn.Linear)]
    assert found == linears
    assert not isinstance(head.mlp[-1], torch.nn.GELU)


def test_a_rank_without_masked_patches_still_gets_gradients() -> None:
    head = PrototypeHead(8, prototypes=12, bottleneck=5, hidden=16, layers=3)
    initialise(head, 0)
    scores = head(torch.zeros(0, 8))
    assert scores.shape == (0, 12)
    scores.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
