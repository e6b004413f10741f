"""Attention kernels: the stock ones against plain products, those of CUDA by their index logic, with a naive stand-in
for the kernel."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import attention_statistics
from models.attention_kernels import kernel
from models.attention_statistics import (
    SDPA,
    Batched,
    VariableLength,
    matrix_products,
    plain_backward,
    run_starts,
    stock,
    stock_backward,
)
from models.dilated_attention import dilated_attention, lay_out
from models.longnet import LongNet
from tests.gpu.fake_gpu import fake_gpu

CPU = torch.device("cpu")
SHAPES = [(3, 5), (1, 9), (2, 1), (1, 9)]  # runs of several lengths, one length twice
ROWS = sum(runs * length for runs, length in SHAPES)


def normal(*size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def naive_attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """What a kernel for runs of many lengths promises, one run and head at a time."""
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    assert starts.dtype == torch.int32 and longest == starts.diff().max()
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for head in range(q.shape[1]):
            scores = q[start:stop, head] @ k[start:stop, head].T / q.shape[2] ** 0.5
            out[start:stop, head] = scores.softmax(-1) @ v[start:stop, head]
            lse[head, start:stop] = scores.logsumexp(-1)
    return out, lse


def naive_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, longest: int
) -> tuple[Tensor, ...]:
    assert all(x.is_contiguous() for x in (grad, q, k, v, out, lse)) and lse.shape == (q.shape[1], q.shape[0])
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    scale = q.shape[2] ** -0.5
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for head in range(q.shape[1]):
            rows = slice(start, stop), head
            p = (q[rows] @ k[rows].T * scale - lse[head, start:stop, None]).exp()
            ds = p * (grad[rows] @ v[rows].T - (grad[rows] * out[rows]).sum(1, keepdim=True)) * scale
            dq[rows], dk[rows], dv[rows] = ds @ k[rows], ds.T @ q[rows], p.T @ grad[rows]
    return dq, dk, dv


NAIVE = VariableLength(naive_attend, naive_backward)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_plain_path_agrees_with_the_stock_kernel_forward_and_backward(dtype, monkeypatch):
    monkeypatch.setattr(attention_statistics, "QUERIES_A_BLOCK", 7)  # several blocks of queries, the last one short
    q, k, v, grad = (normal(3, 2, 17, 8, seed=i, dtype=dtype) for i in range(4))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other in zip(stock(q, k, v), matrix_products(q, k, v), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)
    # statistics of a larger softmax, as merged branches have them
    out, lse = stock(q, k, v)
    out, lse = out * 0.5, lse + 0.3
    for one, other in zip(
        stock_backward(grad, q, k, v, out, lse), plain_backward(grad, q, k, v, out, lse), strict=True
    ):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


@pytest.mark.parametrize("heads", [1, 3])
def test_kernels_of_one_length_and_of_many_agree_on_runs_of_many_lengths(heads):
    q, k, v, grad = (normal(ROWS, heads, 4, seed=i) for i in range(4))
    results = []
    for each in (SDPA, Batched(matrix_products, plain_backward), NAIVE):
        out, lse = each.forward(q, k, v, SHAPES)
        assert out.shape == q.shape and lse.shape == q.shape[:2]
        results.append((out, lse, *each.backward(grad, q, k, v, out * 0.5, lse + 0.3, SHAPES)))
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            torch.testing.assert_close(same, one, atol=1e-12, rtol=0)


def test_runs_begin_where_the_ones_before_them_end():
    starts, longest = run_starts(tuple(SHAPES), CPU)
    assert starts.tolist() == [0, 5, 10, 15, 24, 25, 26, 35] and longest == 9


@pytest.mark.parametrize("compatible", [False, True])
def test_dilated_attention_is_the_same_with_a_kernel_of_many_lengths(compatible):
    lengths, segments, ratios = [37, 1, 5, 64, 37], [8, 16, 32], [1, 2, 4]
    q, k, v, grad = (normal(sum(lengths), 4, 4, seed=i).requires_grad_() for i in range(4))
    found = []
    for each in (SDPA, NAIVE):
        out = dilated_attention(q, k, v, lengths, segments, ratios, compatible, each)
        found.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_a_branch_of_many_lengths_is_one_call():
    branch = lay_out((37, 1, 5, 64, 37), 16, 2, range(4), 4, 4, CPU)
    assert len(branch.calls) == 1 and len(branch.calls[0].shapes) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stock_kernels_of_cuda_take_and_give_these_shapes(dtype):
    with fake_gpu():  # operators and shapes of CUDA without the device
        q, k, v, grad = (torch.empty(ROWS, 4, 48, dtype=dtype, device="cuda") for _ in range(4))
        out, lse = SDPA.forward(q, k, v, SHAPES)
        assert out.shape == q.shape and out.dtype == dtype and lse.shape == q.shape[:2] and lse.dtype == torch.float32
        for gradient in SDPA.backward(grad, q, k, v, out, lse, SHAPES):
            assert gradient.shape == q.shape and gradient.dtype == dtype


class Calls(TorchDispatchMode):
    """Notes what operators are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[tuple]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)].append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [40, 64])  # padded, and a multiple of what CUDA's kernel aligns to
def test_statistics_are_given_to_cudas_backward_densely(length):
    """It takes the last stride for 1 whatever that is."""
    with fake_gpu(), Calls() as calls:
        q, k, v, grad = (torch.empty(6 * length, 4, 48, device="cuda") for _ in range(4))
        out, lse = SDPA.forward(q, k, v, [(6, length)])
        SDPA.backward(grad, q, k, v, out, lse, [(6, length)])
    (given,) = calls.seen["aten._scaled_dot_product_efficient_attention_backward.default"]
    statistics = given[6]
    assert statistics.shape == (6, 4, 64) and statistics.is_contiguous()


def test_runs_of_all_lengths_are_one_call_of_flash_on_cuda_with_the_rows_at_which_they_begin():
    with fake_gpu(), Calls() as calls:
        q, k, v, grad = (torch.empty(ROWS, 4, 48, dtype=torch.bfloat16, device="cuda") for _ in range(4))
        out, lse = SDPA.forward(q, k, v, SHAPES)
        SDPA.backward(grad, q, k, v, out, lse, SHAPES)
    runs = sum(count for count, _ in SHAPES)
    for name, starts in (("_flash_attention_forward", slice(3, 5)), ("_flash_attention_backward", slice(6, 8))):
        (arguments,) = calls.seen[f"aten.{name}.default"]
        assert all(one.shape == (runs + 1,) and one.dtype == torch.int32 for one in arguments[starts])
        assert arguments[starts.stop : starts.stop + 2] == (9, 9)  # the longest run
    assert calls.seen["aten._flash_attention_backward.default"][0][5].shape == (4, ROWS)  # the log-sum-exp


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")
@pytest.mark.parametrize("name", ["varlen", "flash_attn", "xformers"])
def test_a_kernel_without_its_device_is_one_clear_sentence(name):
    with pytest.raises(ValueError, match=f"attention={name} needs a CUDA device.* use attention=sdpa"):
        LongNet(
            12, width=16, depth=1, heads=4, feed_forward_width=24, segment_lengths=[8], dilated_ratios=[1], dropout=0.0,
            drop_path=0.0, compatible=False, attention=name,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "package"), [("flash_attn", "flash-attn"), ("xformers", "xformers")])
def test_a_kernel_without_its_package_is_one_clear_sentence(name, package, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, name, None)  # as if it were not installed
    with pytest.raises(
        ValueError, match=f"attention={name} needs the package .*pip install .*{package}.* attention=sdpa"
    ):
        kernel(name)


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="sdpa, varlen, flash_attn or xformers, not 'fast'"):
        kernel("fast")


def test_a_kernel_of_16_bits_says_so_to_other_numbers(monkeypatch):
    q = normal(4, 2, 8, seed=0, dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"float32: use attention=sdpa, or set trainer\.precision=bf16"):
        kernel("varlen").forward(q, q, q, [(1, 4)])
