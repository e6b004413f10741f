"""Losses: values by hand, spread by optimisation, finite where the references are not."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pretrain.objectives.losses.assignment import centred_softmax, moved_centre, sinkhorn_knopp
from pretrain.objectives.losses.cross_entropy import (
    dino_cross_entropy,
    masked_cross_entropy,
    weighted_cross_entropy,
)
from pretrain.objectives.losses.spread import kde, koleo


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Cross-entropies ---------------------------------------------------------------------------------------------------


def test_dino_cross_entropy_of_a_case_done_by_hand() -> None:
    # One tile, one student view with logits (0, log 3) at temperature 1: probabilities (1/4, 3/4). Targets (1, 0) and
    # (1/2, 1/2).
    student = torch.tensor([[[0.0, math.log(3)]]])
    teacher = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    by_hand = (math.log(4) + (math.log(4) + math.log(4 / 3)) / 2) / 2
    assert float(dino_cross_entropy(student, teacher, 1.0)) == pytest.approx(by_hand, abs=1e-6)


def test_dino_cross_entropy_is_the_mean_over_every_pair_of_views() -> None:
    student, teacher = drawn(3, 5, 7), drawn(2, 5, 7, seed=1).softmax(-1)
    pairs = [F.cross_entropy(student[s] / 0.1, teacher[t]) for s in range(3) for t in range(2)]
    torch.testing.assert_close(dino_cross_entropy(student, teacher, 0.1), torch.stack(pairs).mean())


def test_masked_cross_entropy_counts_every_crop_the_same() -> None:
    # Three crops: one with a single masked patch, one with three, one with none. Each patch's own cross-entropy is log
    # 2.
    weight = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3])
    teacher = torch.tensor([[1.0, 0.0]] * 4)
    assert float(masked_cross_entropy(torch.zeros(4, 2), teacher, weight, 3, 0.1)) == pytest.approx(
        2 / 3 * math.log(2), abs=1e-6
    )
    sharper = torch.tensor(
        [[0.1, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    )  # at temperature .1 the first has probability e/(1+e)
    by_hand = (math.log(1 + math.exp(-1)) + math.log(2)) / 3
    assert float(masked_cross_entropy(sharper, teacher, weight, 3, 0.1)) == pytest.approx(by_hand, abs=1e-6)


def test_no_masked_patch_is_a_loss_of_zero() -> None:
    assert float(masked_cross_entropy(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0), 6, 0.1)) == 0.0


@pytest.mark.parametrize("student", [(6, 9), (3, 6, 9)])
def test_a_weighted_cross_entropy_has_torchs_value_and_gradient(student: tuple[int, ...]) -> None:
    logits = drawn(*student).double().requires_grad_()
    teacher, weight = drawn(6, 9, seed=1).double().softmax(-1), torch.rand(6, dtype=torch.float64)
    found = weighted_cross_entropy(logits, teacher, weight, 0.1)
    expected = -(weight * (teacher * (logits / 0.1).log_softmax(-1)).sum(-1)).sum()
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(3 * found, logits), torch.autograd.grad(3 * expected, logits), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda logits: weighted_cross_entropy(logits, teacher, weight, 0.5), (logits,))


def test_a_cross_entropy_of_16_bit_logits_is_a_float32_one_and_keeps_16_bits_of_them() -> None:
    logits = drawn(40, 30).bfloat16().requires_grad_()
    teacher, weight, kept = drawn(40, 30, seed=1).softmax(-1), torch.rand(40), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = weighted_cross_entropy(logits, teacher, weight, 0.1)
    wide = logits.detach().float().requires_grad_()
    expected = weighted_cross_entropy(wide, teacher, weight, 0.1)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert sum(tensor.nbytes for tensor in kept) == logits.nbytes + weight.nbytes
    (grad,), (exact,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, wide)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.float(), exact, rtol=2**-7, atol=1e-9)  # rounded twice


# Assignment --------------------------------------------------------------------------------------------------------


def test_centred_softmax_by_hand() -> None:
    found = centred_softmax(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0 - 0.5 * math.log(3)]]), 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.75]]))


def test_the_centre_moves_a_tenth_of_the_way_to_the_mean() -> None:
    moved = moved_centre(torch.tensor([[1.0, 0.0]]), torch.tensor([[6.0, 8.0]]), rows=2)
    torch.testing.assert_close(moved, torch.tensor([[0.9 + 0.3, 0.4]]))


def test_sinkhorn_knopp_equals_three_rounds_written_out() -> None:
    logits = drawn(6, 9).double()
    q = torch.exp(logits / 0.5)
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / 9
        q = q / q.sum(1, keepdim=True) / 6
    torch.testing.assert_close(sinkhorn_knopp(logits.float(), 0.5), (q * 6).float(), atol=1e-6, rtol=1e-5)


@given(st.integers(1, 30), st.integers(2, 40), st.integers(0, 20))
def test_sinkhorn_rows_are_distributions_and_finite_at_logits_of_fifty(rows: int, prototypes: int, seed: int) -> None:
    logits = 100 * torch.rand(rows, prototypes, generator=torch.Generator().manual_seed(seed)) - 50
    found = sinkhorn_knopp(logits, 0.04)
    assert found.isfinite().all() and (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(rows), atol=1e-5, rtol=0)


def test_sinkhorn_uses_the_prototypes_equally_where_a_softmax_does_not() -> None:
    logits = drawn(64, 8) + torch.tensor([4.0] + [0.0] * 7)  # everybody prefers the first prototype
    assert (logits / 0.5).softmax(1).sum(0)[0] > 40
    torch.testing.assert_close(
        sinkhorn_knopp(logits, 0.5, iterations=50).sum(0), torch.full((8,), 8.0), atol=0.05, rtol=0
    )
    assert (sinkhorn_knopp(logits, 0.5).sum(0) - 8).abs().max() < 2.5


def test_sinkhorn_of_no_sample_is_no_row() -> None:
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.1).shape == (0, 5)


# Spread ------------------------------------------------------------------------------------------------------------


def test_koleo_of_a_square_done_by_hand() -> None:
    corners = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert float(koleo(corners, 4)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)
    assert float(koleo(3 * corners, 4)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)  # only directions count


def test_kde_of_a_square_done_by_hand() -> None:
    corners = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    by_hand = math.log((2 * math.exp(0) + math.exp(-5)) / 3)
    assert float(kde(corners, 4, concentration=5.0)) == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("loss", [koleo, kde])
def test_groups_do_not_see_each_other(loss) -> None:  # type: ignore[no-untyped-def]
    x = drawn(12, 6)
    torch.testing.assert_close(loss(x, 4), torch.stack([loss(x[i : i + 4], 4) for i in (0, 4, 8)]).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [koleo, kde])
def test_identical_rows_give_a_finite_value_and_no_push(loss, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    x = drawn(1, 8).expand(6, 8).to(dtype).clone().requires_grad_()
    value = loss(x, 6)
    value.backward()
    assert value.isfinite() and x.grad is not None and x.grad.isfinite().all()
    assert (
        x.grad.float().abs().max() < 1e-4
    )  # there is no direction to push duplicates in; a large one would be rounding


@pytest.mark.parametrize("loss", [koleo, kde])
def test_zero_rows_stay_finite(loss) -> None:  # type: ignore[no-untyped-def]
    x = torch.zeros(4, 8, requires_grad=True)
    loss(x, 4).backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("loss", [koleo, kde])
def test_optimised_alone_it_spreads_features(loss) -> None:  # type: ignore[no-untyped-def]
    x = (drawn(32, 16) + 1.0).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.05)

    def mean_cosine() -> float:
        unit = F.normalize(x.detach(), dim=-1)
        return float((unit @ unit.T)[~torch.eye(32, dtype=torch.bool)].mean())

    before = mean_cosine()
    for _ in range(100):
        optimiser.zero_grad()
        loss(x, 32).backward()
        optimiser.step()
    assert before > 0.4 and mean_cosine() < 0.1


@pytest.mark.parametrize("loss", [koleo, kde])
def test_gradients_are_those_of_finite_differences(loss) -> None:  # type: ignore[no-untyped-def]
    x = drawn(6, 5).requires_grad_()
    loss(x, 6).backward()
    assert x.grad is not None
    direction = drawn(6, 5, seed=3)
    step = 1e-3
    with torch.no_grad():
        slope = (loss(x + step * direction, 6) - loss(x - step * direction, 6)) / (2 * step)
    assert float(slope) == pytest.approx(float((x.grad * direction).sum()), rel=2e-2, abs=1e-3)
