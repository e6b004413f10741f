from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import dilated_attention as dilated
from models.dilated_attention import CALL_ELEMENTS, _cut, check_schedule, dilated_attention, lay_out

CPU = torch.device("cpu")


def random_qkv(tokens: int, heads: int, width: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, heads, width, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    ]


def key_counts(n: int, heads: int, segments: list[int], ratios: list[int]) -> torch.Tensor:
    """(heads, n, n): in how many branches a query meets a key, straight from the definition."""
    counts = torch.zeros(heads, n, n, dtype=torch.float64)
    for w, r in zip(segments, ratios, strict=True):
        w = min(w, n)
        for head in range(heads):
            phase = head // ceil(heads / r)
            for query in range(n):
                for key in range(n):
                    active = (query % w) % r == phase and (key % w) % r == phase
                    counts[head, query, key] += active and query // w == key // w
    return counts


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: list[int], ratios: list[int]) -> torch.Tensor:
    """One softmax over all keys of all branches, a key weighing as often as it is met."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = key_counts(q.shape[0], q.shape[1], segments, ratios) * scores.exp()
    return torch.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdim=True).clamp(min=1e-300), v)


def published(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: list[int], ratios: list[int]
) -> torch.Tensor:
    """Branch by branch and head by head, with zero keys in incomplete segments and constant branch weights."""
    n, heads, width = q.shape
    outs, lses = [], []
    for w, r in zip(segments, ratios, strict=True):
        w = min(w, n)
        out, lse = q.new_zeros(n, heads, width), q.new_full((n, heads), -torch.inf)
        for head in range(heads):
            phase = head // ceil(heads / r)
            for start in range(0, n, w):
                rows = torch.arange(start, min(start + w, n))[phase::r]
                if len(rows) == 0 or phase >= r:
                    continue
                zeros = ceil(w / r) - len(rows)
                keys = torch.cat([k[rows, head], k.new_zeros(zeros, width)])
                values = torch.cat([v[rows, head], v.new_zeros(zeros, width)])
                scores = q[rows, head] @ keys.T / width**0.5
                out = out.index_put((rows, torch.tensor(head)), scores.softmax(-1) @ values)
                lse = lse.index_put((rows, torch.tensor(head)), scores.logsumexp(-1))
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).detach().softmax(0)[..., None].nan_to_num()
    return (torch.stack(outs) * weights).sum(0)


SCHEDULES = [
    (4, [4, 8, 16], [1, 2, 4], 37),
    (6, [8, 12], [1, 4], 29),  # the ratio does not divide the heads: a group is empty
    (5, [6, 10], [2, 5], 23),  # groups of unequal size
    (4, [64], [2], 21),  # shorter than a segment
]


@pytest.mark.parametrize(("heads", "segments", "ratios", "n"), SCHEDULES)
def test_output_and_gradients_equal_a_dense_computation_of_the_same_operator(heads, segments, ratios, n):
    q, k, v = random_qkv(n, heads)
    cotangent = torch.randn(n, heads, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, reference = dilated_attention(q, k, v, [n], segments, ratios), dense(q, k, v, segments, ratios)
    torch.testing.assert_close(ours, reference, atol=1e-12, rtol=0)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (q, k, v), cotangent),
        torch.autograd.grad(reference, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("heads", "segments", "ratios", "n"), SCHEDULES)
def test_compatible_mode_equals_the_published_formulation_with_its_padding_and_constant_weights(
    heads, segments, ratios, n
):
    q, k, v = random_qkv(n, heads)
    cotangent = torch.randn(n, heads, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = dilated_attention(q, k, v, [n], segments, ratios, compatible=True)
    reference = published(q, k, v, segments, ratios)
    torch.testing.assert_close(ours, reference, atol=1e-12, rtol=0)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (q, k, v), cotangent),
        torch.autograd.grad(reference, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_gradients_equal_finite_differences():
    q, k, v = random_qkv(11, 4, width=2)
    assert torch.autograd.gradcheck(
        lambda q, k, v: dilated_attention(q, k, v, [4, 7], [2, 6], [1, 2]), (q, k, v), eps=1e-6, atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("compatible", [False, True])
def test_packed_slides_of_any_lengths_give_each_slides_own_result_and_gradient(compatible):
    lengths, segments, ratios = [37, 1, 5, 64, 37], [8, 16, 32], [1, 2, 4]
    q, k, v = random_qkv(sum(lengths), 4)
    packed = dilated_attention(q, k, v, lengths, segments, ratios, compatible)
    alone = torch.cat(
        [
            dilated_attention(*parts, [len(parts[0])], segments, ratios, compatible)
            for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        ]
    )
    torch.testing.assert_close(packed, alone, atol=1e-13, rtol=0)
    for one, other in zip(
        torch.autograd.grad(packed.square().sum(), (q, k, v)),
        torch.autograd.grad(alone.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=0)


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), max_size=6),
    per_call=st.integers(0, 40),
    together=st.integers(1, 4),
)
def test_calls_hold_all_runs_in_order_and_no_more_tokens_than_allowed(shapes, per_call, together):
    calls = list(_cut(shapes, per_call, together))
    runs = [length for call in calls for count, length in call for _ in range(count)]
    assert runs == [length for count, length in shapes for _ in range(count)]
    for call in calls:
        tokens, count = sum(count * length for count, length in call), sum(count for count, _ in call)
        assert count and (tokens <= per_call or (len(call) == 1 and count <= together))


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(
    ("heads", "segments", "ratios", "n"), [(4, [4, 8, 16], [1, 2, 4], 37), (8, [8, 12], [1, 4], 29)]
)
def test_some_of_the_heads_give_what_they_give_among_all(heads, segments, ratios, n, processes):
    q, k, v = random_qkv(n, heads)
    whole = dilated_attention(q, k, v, [n], segments, ratios)
    some = heads // processes
    parts = [
        dilated_attention(*(x[:, i : i + some] for x in (q, k, v)), [n], segments, ratios, of_heads=(i, heads))
        for i in range(0, heads, some)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-13, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    w=st.integers(1, 8),
    r=st.sampled_from([1, 2, 3, 4, 8]),
    heads=st.sampled_from([1, 3, 4, 6, 8]),
)
def test_a_branch_holds_each_active_token_and_head_once_without_padding(lengths, w, r, heads):
    branch = lay_out(tuple(lengths), w * r, r, range(heads), heads, 8, CPU)
    units = heads // branch.unit
    every = torch.arange(sum(lengths) * units)
    each = [every if call.rows is None else every[call.rows] for call in branch.calls]
    for call, rows in zip(branch.calls, each, strict=True):
        assert sum(runs * length for runs, length in call.shapes) == len(rows)
    expected = [
        (start + t) * units + unit
        for start, n in zip([sum(lengths[:i]) for i in range(len(lengths))], lengths, strict=True)
        for t in range(n)
        for unit in range(units)
        if (t % min(w * r, n)) % r == unit * branch.unit // ceil(heads / r)
    ]
    assert torch.cat([every[:0], *each]).sort().values.tolist() == expected


def test_no_call_has_more_runs_than_a_cuda_grid_has_rows(monkeypatch):
    monkeypatch.setattr(dilated, "MOST_RUNS", 10)
    branch = lay_out.__wrapped__((3, 4) * 20 + (1000,), 64, 2, range(4), 4, 8, CPU)
    runs = [sum(count for count, _ in call.shapes) for call in branch.calls]
    assert sum(runs) == 4 * 40 + 4 * 16 and max(runs) <= 10
    assert len(torch.cat([call.rows for call in branch.calls]).unique()) == (7 * 20 + 1000) * 4 // 2


def test_large_branches_are_cut_into_calls_that_give_the_same(monkeypatch):
    q, k, v = random_qkv(100, 4)
    whole = dilated_attention(q, k, v, [100], [8, 16], [1, 2])
    lay_out.cache_clear()
    monkeypatch.setitem(CALL_ELEMENTS, "cpu", 200)
    try:
        cut = dilated_attention(q, k, v, [100], [8, 16], [1, 2])
        assert len(lay_out((100,), 16, 2, range(4), 4, 4, CPU).calls) > 4
    finally:
        lay_out.cache_clear()
    torch.testing.assert_close(cut, whole, atol=1e-14, rtol=0)


def test_layers_share_one_cached_plan_per_lengths():
    q, k, v = random_qkv(50, 4)
    lay_out.cache_clear()
    for _ in range(3):
        dilated_attention(q, k, v, [20, 30], [8, 16], [1, 2])
    assert lay_out.cache_info().misses == 2 and lay_out.cache_info().hits == 4


def test_a_ratio_that_does_not_divide_its_segment_is_refused_with_the_nearest_valid_schedule():
    with pytest.raises(ValueError, match=r"nearest valid lengths are \[1024, 185360\]"):
        check_schedule([1024, 185363], [1, 8])
    q, k, v = random_qkv(12, 4)
    with pytest.raises(ValueError, match=r"\[12\]|\[8\]"):
        dilated_attention(q, k, v, [12], [10], [4])
    dilated_attention(
        q[:10], k[:10], v[:10], [10], [10], [4]
    )  # a slide no longer than the segment never meets the fault


def test_lengths_that_do_not_add_up_are_refused():
    q, k, v = random_qkv(12, 4)
    with pytest.raises(ValueError, match="do not make up the 12"):
        dilated_attention(q, k, v, [5, 6], [8], [1])


def test_a_token_that_no_branch_makes_active_gives_zeros_and_no_gradient():
    q, k, v = random_qkv(16, 6)
    out = dilated_attention(q, k, v, [16], [8], [4])  # groups of 2 heads: offsets ≡ 3 (mod 4) have no heads
    assert out[3::4].eq(0).all() and out[0, :2].ne(0).all()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def test_bfloat16_is_accumulated_in_float32():
    q, k, v = (x.detach().float() for x in random_qkv(200, 4, width=16))
    segments, ratios = [8, 16, 32, 64], [1, 2, 4, 4]
    low = [x.bfloat16() for x in (q, k, v)]
    exact = dilated_attention(*(x.float() for x in low), [200], segments, ratios)
    assert (dilated_attention(*low, [200], segments, ratios).float() - exact).abs().max() < 1.2e-2 * exact.abs().max()


def test_a_plan_made_in_inference_mode_serves_training_too():
    lay_out.cache_clear()
    q, k, v = random_qkv(40, 4)
    with torch.inference_mode():
        evaluated = dilated_attention(q, k, v, [40], [8, 16], [1, 2], compatible=True)
    trained = dilated_attention(q, k, v, [40], [8, 16], [1, 2], compatible=True)
    trained.sum().backward()
    assert lay_out.cache_info().misses == 2 and torch.equal(evaluated, trained) and q.grad.isfinite().all()
