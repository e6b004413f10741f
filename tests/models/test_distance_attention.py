"""Attention by distance in blocks is the dense computation, gradients too, without a tensor of all pairs."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from models import distance_attention as by_distance
from models.distance_attention import (
    SQUARE,
    DistanceLayout,
    alibi_slopes,
    check_reach,
    compiled_flex,
    distance_attention,
    flex_distances,
    lay_out_tokens,
)

REACHES = {"all": None, "one": [3.0], "each": [2.0, 8.5, 19.0]}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that slides have many, the last ones short."""
    monkeypatch.setattr(by_distance, "QUERIES", 20)
    monkeypatch.setattr(by_distance, "SCORES", 3 * 20 * 13)


def inputs(lengths: list[int], special: int, heads: int = 3, width: int = 7, dtype: torch.dtype = torch.float64):
    """q, k, v, slopes and the gradient of the output; cells, some of them twice or not whole."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(sum(lengths), heads, width, dtype=dtype, generator=draw) for _ in range(4))
    cells = torch.randint(-20, 30, (sum(lengths) - special * len(lengths), 2), generator=draw) / 2
    slopes = alibi_slopes(heads).to(dtype) + 0.1
    return [x.requires_grad_() for x in (q, k, v, slopes)], grad, cells


def dense(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cells: Tensor, lengths, special: int, reach) -> Tensor:
    """All pairs of each slide at once."""
    found = []
    places = cells.to(q.dtype).split([n - special for n in lengths])
    for *qkv, at in zip(*(x.split(lengths) for x in (q, k, v)), places, strict=True):
        queries, keys, values = (x.transpose(0, 1) for x in qkv)
        distance = queries.new_zeros(2 * (queries.shape[1],))
        distance[special:, special:] = (at[:, None] - at).square().sum(-1).sqrt()
        scores = queries @ keys.mT * q.shape[-1] ** -0.5 - slopes[:, None, None] * distance
        if reach:
            scores = scores.masked_fill(distance > scores.new_tensor(reach)[:, None, None], -torch.inf)
        found.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("special", [0, 1, 5])
def test_it_equals_the_dense_computation_with_gradients_of_slopes_too(special, reach, dtype, tolerance):
    lengths = [203, special + 1, 77, special + 21]
    given, grad, cells = inputs(lengths, special, dtype=dtype)
    layout = lay_out_tokens(cells, lengths, special, REACHES[reach])
    out, reference = (
        distance_attention(*given[:3], layout, given[3]),
        dense(*given, cells, lengths, special, REACHES[reach]),
    )
    torch.testing.assert_close(out, reference, atol=tolerance, rtol=0)
    ours, theirs = (torch.autograd.grad(x, given, grad) for x in (out, reference))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("reach", REACHES)
def test_a_slide_has_the_same_numbers_whatever_it_is_packed_with(reach):
    lengths = [60, 41, 2]
    given, _, cells = inputs(lengths, 1, dtype=torch.float32)
    packed = distance_attention(*given[:3], lay_out_tokens(cells, lengths, 1, REACHES[reach]), given[3])
    for parts, out in zip(
        zip(*(x.split(lengths) for x in given[:3]), cells.split([59, 40, 1]), strict=True),
        packed.split(lengths),
        strict=True,
    ):
        *qkv, at = parts
        alone = distance_attention(*qkv, lay_out_tokens(at, [len(out)], 1, REACHES[reach]), given[3])
        torch.testing.assert_close(out, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reach", REACHES)
def test_cells_without_a_tile_see_themselves_alone_and_nothing_sees_them(reach):
    lengths = [90, 50]
    (q, k, v, slopes), grad, cells = inputs(lengths, 2)
    valid = torch.rand(len(cells), generator=torch.Generator().manual_seed(1)) < 0.7
    layout = lay_out_tokens(cells, lengths, 2, REACHES[reach], valid)
    out = distance_attention(q, k, v, layout, slopes)
    counted = lay_out_tokens(cells, lengths, 2, REACHES[reach], valid, [n - 2 for n in layout.lengths])
    assert counted.lengths == layout.lengths and counted.rows.equal(layout.rows)
    there = torch.cat([part for slide in valid.split([88, 48]) for part in (torch.ones(2, dtype=torch.bool), slide)])
    kept = [int(slide.sum()) for slide in there.split(lengths)]
    reference = dense(q[there], k[there], v[there], slopes, cells[valid], kept, 2, REACHES[reach])
    torch.testing.assert_close(out[there], reference, atol=1e-12, rtol=0)
    torch.testing.assert_close(out[~there], v[~there], atol=0, rtol=0)
    of_values = torch.autograd.grad(out, v, grad)[0]
    torch.testing.assert_close(of_values[~there], grad[~there], atol=0, rtol=0)


@pytest.mark.parametrize("reach", [None, [3.0]])
def test_no_tensor_is_larger_than_the_queries_forward_or_backward(monkeypatch, reach):
    monkeypatch.setattr(by_distance, "QUERIES", 128)
    monkeypatch.setattr(by_distance, "SCORES", 3 * 128 * 128)
    tokens = 2000
    given, grad, cells = inputs([tokens], 1, width=32, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = distance_attention(*given[:3], lay_out_tokens(cells, [tokens], 1, reach), given[3])
        torch.autograd.grad(out, given, grad)
    # The allocator reports every allocation, those inside of the operator too.
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) == given[0].nbytes < tokens**2  # all pairs in float32 are 4 × heads × tokens²


def test_with_a_reach_the_work_grows_with_tiles_and_not_with_their_square():
    def pairs(side: int) -> int:
        numbers = torch.arange(side**2)
        layout = lay_out_tokens(torch.stack([numbers % side, numbers // side], 1), [side**2], 0, [8.0])
        work = by_distance._work(layout.places, layout.lengths, 0, layout.reach, 1)
        return sum((q.stop - q.start) * sum(k.stop - k.start for k in keys) for _, q, keys in work)

    assert pairs(96) <= 4.6 * pairs(48)  # four times the tiles, and less of a border
    assert pairs(96) <= 96**2 * (3 * SQUARE) ** 2


def stand_in(q: Tensor, k: Tensor, v: Tensor, score_mod, block_mask) -> Tensor:
    """FlexAttention's meaning in plain products: torch's own has no backward on CPUs."""
    head, nothing = torch.arange(q.shape[1])[:, None, None], torch.tensor(0)
    i = torch.arange(q.shape[2])[:, None].expand(q.shape[2], -1)
    scores = score_mod(q @ k.mT * q.shape[-1] ** -0.5, nothing, head, i, i.mT)
    return scores.masked_fill(~block_mask.mask_mod(nothing, head, i, i.mT), -torch.inf).softmax(-1) @ v


def of_layout(given: list[Tensor], layout: DistanceLayout) -> list[Tensor]:
    return [x if layout.rows is None else x[layout.rows] for x in given[:3]]


@pytest.mark.parametrize("reach", REACHES)
def test_what_flex_attention_is_given_means_the_same_with_gradients(reach):
    lengths = [140, 60, 4]
    given, grad, cells = inputs(lengths, 3)
    layout = lay_out_tokens(cells, lengths, 3, REACHES[reach])
    out = by_distance._attend(*of_layout(given, layout), layout, given[3])
    flex = flex_distances(*of_layout(given, layout), layout, given[3], stand_in)
    torch.testing.assert_close(flex, out, atol=1e-5, rtol=0)  # its places are float32
    for mine, wanted in zip(*(torch.autograd.grad(x, given, grad) for x in (flex, out)), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("reach", [None, [3.0]])
def test_the_blocks_that_flex_attention_looks_at_hold_every_pair_and_far_fewer_than_all(reach):
    lengths = [1900, 300, 20]
    numbers = torch.arange(sum(lengths) - 6)
    layout = lay_out_tokens(torch.stack([numbers % 45, numbers // 45], 1), lengths, 2, reach)
    i = torch.arange(sum(lengths))[:, None].expand(sum(lengths), -1)
    pairs = layout.block_mask.mask_mod(torch.tensor(0), torch.tensor(0), i, i.mT)
    blocks = -(-len(i) // by_distance.FLEX_BLOCK)
    padded = torch.zeros(2 * (blocks * by_distance.FLEX_BLOCK,), dtype=torch.bool)
    padded[: len(i), : len(i)] = pairs
    needed = padded.view(blocks, by_distance.FLEX_BLOCK, blocks, -1).any(1).any(-1)
    taken = layout.block_mask.to_dense()[0, 0].bool()
    assert not (needed & ~taken).any()
    assert taken.float().mean() < (0.75 if reach is None else 0.6)


def test_flex_attention_is_traced_once_for_slides_of_any_length():
    attend = compiled_flex("aot_eager")
    before = counters["stats"]["unique_graphs"]
    for lengths in ([800, 77], [1203], [290, 31, 500]):
        given, _, cells = inputs(lengths, 3, width=16, dtype=torch.float32)
        layout = lay_out_tokens(cells, lengths, 3, [3.0, 4.0, 5.0])
        with torch.no_grad():
            flex = flex_distances(*of_layout(given, layout), layout, given[3].detach(), attend)
            wanted = by_distance._attend(*of_layout(given, layout), layout, given[3])
        torch.testing.assert_close(flex, wanted, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.slow  # compiles C++
def test_flex_attention_compiled_for_a_cpu_computes_the_same_forward():
    lengths = [1203, 77]
    given, _, cells = inputs(lengths, 3, width=16, dtype=torch.float32)
    layout = lay_out_tokens(cells, lengths, 3, [3.0])
    with torch.no_grad():
        q, k, v = of_layout(given, layout)
        compiled = torch.compile(by_distance.flex_attention, dynamic=False)
        flex = flex_distances(q, k, v, layout, given[3].detach(), compiled)
        torch.testing.assert_close(flex, by_distance._attend(q, k, v, layout, given[3]), atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the backward of FlexAttention needs a GPU")
@pytest.mark.parametrize("reach", REACHES)
def test_on_a_gpu_flex_attention_equals_the_blocks_with_gradients_for_slides_of_any_length(reach):
    for lengths in ([700, 140], [333, 20, 90]):
        given, grad, cells = inputs(lengths, 5, width=32, dtype=torch.float32)
        found = []
        for device in ("cpu", "cuda"):
            here = [x.detach().to(device).requires_grad_() for x in given]
            layout = lay_out_tokens(cells.to(device), lengths, 5, REACHES[reach])
            out = distance_attention(*here[:3], layout, here[3])
            found.append([x.cpu() for x in (out, *torch.autograd.grad(out, here, grad.to(device)))])
        for flex, wanted in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(flex, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


def test_slopes_are_those_of_press_et_al_for_numbers_that_are_no_power_of_two_too():
    eight = [2.0**-i for i in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(8), torch.tensor(eight))
    torch.testing.assert_close(alibi_slopes(12), torch.tensor([*eight, *(2.0**-i for i in (0.5, 1.5, 2.5, 3.5))]))
    torch.testing.assert_close(alibi_slopes(1), torch.tensor([2.0**-8]))


def test_in_low_precision_statistics_are_float32_under_autocast_too():
    given, _, cells = inputs([150], 1, dtype=torch.float32)
    layout = lay_out_tokens(cells, [150], 1)
    low = [x.detach().bfloat16() for x in given[:3]]
    exact = distance_attention(*(x.float() for x in low), layout, given[3])
    with torch.autocast("cpu", torch.bfloat16):
        out = distance_attention(*low, layout, given[3])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=4e-3 * float(exact.detach().abs().max()), rtol=0)


def test_reaches_and_layouts_that_do_not_fit_are_refused():
    check_reach(None, 4), check_reach([2.0], 4), check_reach([1.0, 2.0], 2)
    with pytest.raises(ValueError, match="one number for all heads, or one for each of the 4"):
        check_reach([1.0, 2.0], 4)
    given, _, cells = inputs([20], 1)
    with pytest.raises(ValueError, match="does not fit 20"):
        distance_attention(*given[:3], lay_out_tokens(cells[1:], [19], 1), given[3])
