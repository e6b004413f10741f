"""What a block computes anew in its backward: the same numbers as torch's, and less kept."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from models.attention import attend
from models.recomputed import add_to_rows, gelu_linear, swiglu, swiglu_linear
from models.vit import MLP, Block, KeptSamples, SwiGLU

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


@pytest.mark.parametrize(("feed_forward", "hidden", "most"), [(MLP, 256, 16.0), (SwiGLU, 172, 17.0)])
def test_a_block_keeps_so_many_widths_a_token_for_its_backward(feed_forward: type, hidden: int, most: float) -> None:
    """With stochastic depth, two crop sizes and the attention of a GPU; without these two functions 21 and 24."""
    width, shapes = 64, [(8, 50), (16, 10)]
    block = Block(width, 4, hidden, feed_forward, scaled=True, attention="sdpa")
    block.attn.attend = partial(attend, fused=True)
    block.ls1.gamma.data.fill_(0.1), block.ls2.gamma.data.fill_(0.1)
    x = torch.randn(1000, width)
    rows = torch.randperm(1000)[: sum(crops * tokens for crops, tokens in shapes)]
    kept = KeptSamples(rows, shapes, torch.ones(len(rows), 1))
    storages, held = {}, []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        if (
            tensor.is_floating_point()
            and not isinstance(tensor, torch.nn.Parameter)
            and tensor.numel() >= len(rows) * 4
        ):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, shapes, (kept, kept)).sum().backward()
    assert 10 < sum(storages.values()) / 4 / len(rows) / width <= most
