"""What a block computes anew in its backward: the same numbers as torch's, and less kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from models.recomputed import add_to_rows, gelu_linear, swiglu, swiglu_linear

DRAW = torch.Generator().manual_seed(0)


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=DRAW).requires_grad_()


@pytest.mark.parametrize(
    ("ours", "activation", "inputs"), [(gelu_linear, F.gelu, 12), (swiglu_linear, swiglu, 24)], ids=["gelu", "swiglu"]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_an_activated_linear_map_has_torchs_results_and_gradients_and_keeps_what_comes_in(
    ours, activation, inputs: int, with_bias: bool
) -> None:
    x, weight, bias = normal(7, inputs), normal(5, 12), normal(5) if with_bias else None
    given = [x, weight] if bias is None else [x, weight, bias]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = ours(x, weight, bias)
    expected = F.linear(activation(x), weight, bias)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    grad = torch.randn(7, 5, dtype=torch.float64, generator=DRAW)
    for one, other in zip(
        torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, given, grad), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=0)
    assert {id(tensor) for tensor in kept} == {id(x), id(weight)}
    assert torch.autograd.gradcheck(ours, (x, weight, bias))


def test_rows_are_added_with_torchs_results_and_gradients_and_no_copy_of_them_is_kept() -> None:
    x, part, rows = normal(6, 3), normal(4, 3), torch.tensor([5, 0, 2, 3])
    scale = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64).unsqueeze(1)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = add_to_rows(x, rows, part, scale)
    torch.testing.assert_close(found, x.index_add(0, rows, part * scale))
    assert {id(tensor) for tensor in kept} == {id(rows), id(scale)}
    assert torch.autograd.gradcheck(lambda x, part: add_to_rows(x, rows, part, scale), (x, part))


def test_a_frozen_map_asks_for_no_gradient_of_its_own() -> None:
    x, weight = normal(7, 12), normal(5, 12).detach()
    gelu_linear(x, weight, None).sum().backward()
    assert x.grad is not None and weight.grad is None
