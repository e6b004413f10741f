"""The ends of a block's branches: the same numbers as torch's, and less kept."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from models.attention import _SplitHeads, attend
from models.recomputed import GELU, NONE, SWIGLU, Activation, add_linear, take_rows
from models.vit import MLP, Block, KeptSamples, SwiGLU

DRAW = torch.Generator().manual_seed(0)


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=DRAW).requires_grad_()


def noting(kept: list[Tensor]) -> saved_tensors_hooks:
    """Fills ``kept`` with what is saved for a backward."""
    return saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor)


def written_out(
    x: Tensor,
    parts: list[Tensor],
    linear: nn.Linear,
    gamma: Tensor | None,
    activation: Activation,
    rows: Tensor | None,
    groups: list[tuple[int, float]],
) -> Tensor:
    """What `add_linear` computes, operator by operator."""
    found = F.linear(activation[0](torch.cat(parts)), linear.weight, linear.bias)
    found = found if gamma is None else found * gamma
    if rows is None:
        return x + found
    scales = torch.cat([torch.full((size, 1), scale, dtype=x.dtype) for size, scale in groups])
    return x.index_add(0, rows, found * scales)


@pytest.mark.parametrize(
    ("activation", "inputs"), [(NONE, 12), (GELU, 12), (SWIGLU, 24)], ids=["none", "gelu", "swiglu"]
)
@pytest.mark.parametrize("places", ["all", "rows", "rows, parts apart"])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_branchs_end_has_torchs_results_and_gradients_and_keeps_what_comes_in(
    activation: Activation, inputs: int, places: str, scaled: bool
) -> None:
    linear, gamma = nn.Linear(12, 5, dtype=torch.float64), normal(5) if scaled else None
    parts = [normal(4, inputs), normal(3, inputs)] if places != "rows" else [normal(7, inputs)]
    rows = None if places == "all" else torch.tensor([8, 1, 0, 6, 2, 5, 3])
    x, groups = normal(7 if rows is None else 9, 5), [] if rows is None else [(4, 1.5), (3, 0.25)]
    given = [x, *parts, *linear.parameters(), *([] if gamma is None else [gamma])]
    kept: list[Tensor] = []
    with noting(kept):
        found = add_linear(x, parts, linear, gamma, activation, rows, groups)
    expected = written_out(x, parts, linear, gamma, activation, rows, groups)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    grad = torch.randn(found.shape, dtype=torch.float64, generator=DRAW)
    for one, other in zip(
        torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, given, grad), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    allowed = [*parts, *linear.parameters(), *(some for some in (gamma, rows) if some is not None)]
    assert {id(tensor) for tensor in kept} <= {id(tensor) for tensor in allowed}


def test_gradients_of_a_branchs_end_are_those_of_its_differences() -> None:
    x, hidden, gamma, rows = normal(6, 3), normal(4, 8), normal(3), torch.tensor([5, 0, 2, 3])
    linear = nn.Linear(4, 3, dtype=torch.float64)
    groups = [(1, 2.0), (3, 0.5)]
    assert torch.autograd.gradcheck(
        lambda x, hidden, gamma, *_: add_linear(x, [hidden], linear, gamma, SWIGLU, rows, groups),
        (x, hidden, gamma, *linear.parameters()),
    )


def test_a_branchs_beginning_adds_the_gradients_of_both_ways_and_keeps_its_rows_alone() -> None:
    x, rows = normal(6, 3), torch.tensor([5, 0, 2, 3])
    kept: list[Tensor] = []
    with noting(kept):
        past, through = take_rows(x, rows)
    assert torch.equal(past, x) and torch.equal(through, x[rows])
    assert {id(tensor) for tensor in kept} == {id(rows)}
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows), (x,))


def test_heads_are_split_without_a_copy_and_their_gradients_joined() -> None:
    qkv, shapes = normal(17, 12), [(2, 4), (3, 3)]
    found = _SplitHeads.apply(qkv, tuple(shapes), 2)
    assert {part.untyped_storage().data_ptr() for part in found} == {qkv.untyped_storage().data_ptr()}
    expected = qkv[8:].view(3, 3, 3, 2, 2).permute(2, 0, 3, 1, 4)
    for one, other in zip(found[3:], expected, strict=True):
        assert torch.equal(one, other)
    assert torch.autograd.gradcheck(lambda qkv: _SplitHeads.apply(qkv, tuple(shapes), 2), (qkv,))


def test_a_frozen_map_asks_for_no_gradient_of_its_own() -> None:
    x, linear = normal(7, 5), nn.Linear(12, 5, dtype=torch.float64).requires_grad_(False)
    add_linear(x, [hidden := normal(7, 12)], linear, None, GELU).sum().backward()
    assert x.grad is not None and hidden.grad is not None and linear.weight.grad is None


@pytest.mark.parametrize(("feed_forward", "hidden", "most"), [(MLP, 256, 14.0), (SwiGLU, 172, 15.0)])
def test_a_block_keeps_so_many_widths_a_token_for_its_backward(feed_forward: type, hidden: int, most: float) -> None:
    """With stochastic depth, two crop sizes and the attention of a GPU; as torch has it 21 and 24."""
    width, shapes = 64, [(8, 50), (16, 10)]
    block = Block(width, 4, hidden, feed_forward, scaled=True, attention="sdpa")
    block.attn.attend = partial(attend, fused=True)
    block.ls1.gamma.data.fill_(0.1), block.ls2.gamma.data.fill_(0.1)
    x = torch.randn(1000, width)
    rows = torch.randperm(1000)[: sum(crops * tokens for crops, tokens in shapes)]
    kept = KeptSamples(rows, shapes, [1.0, 1.0])
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
