"""The moving average."""

import pytest
import torch
from torch import nn

from pretrain.objectives import teacher


def pair() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(3, 2), nn.Linear(3, 2)


def test_a_copy_is_equal_and_its_own() -> None:
    student, copy = pair()
    teacher.copy(student, copy)
    assert torch.equal(copy.weight, student.weight)
    with torch.no_grad():
        student.weight.add_(1)
    assert not torch.equal(copy.weight, student.weight)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
def test_following_is_the_formula(momentum: float) -> None:
    student, follower = pair()
    expected = [
        momentum * t.detach() + (1 - momentum) * s.detach()
        for s, t in zip(student.parameters(), follower.parameters(), strict=True)
    ]
    before = [s.detach().clone() for s in student.parameters()]
    teacher.ema_update(student, follower, momentum)
    for value, wanted in zip(follower.parameters(), expected, strict=True):
        torch.testing.assert_close(value.detach(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))


def test_networks_that_differ_are_refused() -> None:
    with pytest.raises(ValueError):
        teacher.ema_update(nn.Linear(3, 2), nn.Linear(3, 2, bias=False), 0.9)
