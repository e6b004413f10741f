"""Dilated attention (LongNet, Ding et al. 2023) over packed slides of any lengths, without padding, with exact
gradients.

A branch (w, r) cuts a sequence into segments of w tokens and lets each head see every r-th token of its segment: the
heads are split into r groups, and group g attends among the tokens whose offset in the segment is ≡ g (mod r). So in
one branch a token is active in one group of heads, and the branch is a *permutation* of the tokens into runs, each run
one small dense attention:

    segment of w = 8, r = 2, four heads      tokens 0 1 2 3 4 5 6 7
    heads 0, 1                               run    0 . 2 . 4 . 6 .
    heads 2, 3                               run    . 1 . 3 . 5 . 7

Branches are merged by their log-sum-exp (LSE), as one softmax over all the keys a token saw (a key seen by two branches
counts twice):

    LSE = log Σ_b exp(lse_b)        out = Σ_b exp(lse_b - LSE) out_b

and the gradient of that softmax, branch by branch, is the stock attention backward with the merged ``out`` and ``LSE``.

The public code treats the weights ``exp(lse_b - LSE)`` as constants in the backward, and lets queries attend to the
zero padding of incomplete segments. A model trained that way needs both to give the same numbers: ``compatible=True``.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.attention_statistics import SDPA, EqualRuns, StatisticsKernel
from models.uploaded import repeated

CALL_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}
"""Elements of q in one call of a branch with gaps, unless one run is more: bounds what is copied out at a time."""

MOST_RUNS = 65_535  # of a call: CUDA kernels take a run as a row of their grid, and it has no more


@dataclass(frozen=True)
class Call:
    """Runs that go through attention in one call."""

    rows: Tensor | None  # which rows of the branch's view, run by run; None for all of them in order
    shapes: tuple[EqualRuns, ...]  # (runs, tokens in each), in the order of the rows
    padding: Tensor | None
    """``(rows, 1)``: log of the number of zero keys that the public code adds to a run. None where it adds none."""


@dataclass(frozen=True)
class Branch:
    """One (segment length, ratio) of a schedule, laid out for slides of given lengths."""

    unit: int  # heads of a row: all for ratio 1, one for others; the view is (tokens * heads / unit, unit, head_width)
    calls: list[Call]
    complete: bool  # ratio 1: every token and head is in one of its runs, and all of them are one call


def check_schedule(segment_lengths: Sequence[int], dilated_ratios: Sequence[int]) -> None:
    """Raise ValueError, naming the nearest valid schedule, unless every ratio divides its segment length.

    Where it doesn't, the groups of a segment have different numbers of tokens, and the public code then writes outputs
    to other tokens than the queries they came from (w = 10, r = 4: output 12 belongs to query 10).
    """
    if len(segment_lengths) != len(dilated_ratios) or not segment_lengths:
        raise ValueError(
            f"segment_lengths {list(segment_lengths)} and dilated_ratios {list(dilated_ratios)} must pair up, one ratio"
            " per length"
        )
    if min(*segment_lengths, *dilated_ratios) < 1:
        raise ValueError(f"segment lengths {list(segment_lengths)} and ratios {list(dilated_ratios)} must be positive")
    if any(w % r for w, r in zip(segment_lengths, dilated_ratios, strict=True)):
        nearest = [max(r, round(w / r) * r) for w, r in zip(segment_lengths, dilated_ratios, strict=True)]
        raise ValueError(
            f"segment lengths {list(segment_lengths)} are not all multiples of their dilated ratios"
            f" {list(dilated_ratios)}; the nearest valid lengths are {nearest}"
        )


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    compatible: bool = False,
    kernel: StatisticsKernel = SDPA,
    of_heads: tuple[int, int] | None = None,
) -> Tensor:
    """Dilated attention of packed sequences: (tokens, heads, head_width) each → (tokens, heads, head_width).

    ``lengths`` are the tokens of each slide, in the order in which they are packed; slides do not see each other.
    Gradients are exact, or those of the public code when ``compatible``. A token that no branch makes active (possible
    only when the ratios' groups are more than the heads) gives zeros. ``of_heads``: (first, all), where these are only
    some of a layer's heads, which decides the tokens that each of them sees.

    Raises ValueError when the lengths don't add up, or when a slide is longer than a segment whose ratio doesn't divide
    it.
    """
    if sum(lengths) != q.shape[0] or min(lengths, default=0) < 1:
        raise ValueError(f"slides of {list(lengths)} tokens do not make up the {q.shape[0]} packed ones")
    longest = max(lengths)
    reached = [(w, r) for w, r in zip(segment_lengths, dilated_ratios, strict=True) if longest > w]
    if reached:
        check_schedule(*zip(*reached, strict=True))
    first, every = of_heads or (0, q.shape[1])
    branches = [
        lay_out(tuple(lengths), w, r, range(first, first + q.shape[1]), every, q.shape[2], q.device, compatible)
        for w, r in zip(segment_lengths, dilated_ratios, strict=True)
    ]
    return _DilatedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), branches, compatible, kernel)


def attended_pairs(
    lengths: Sequence[int], segment_lengths: Sequence[int], dilated_ratios: Sequence[int], heads: int
) -> int:
    """Pairs of a query and a key in all runs of all branches and ``heads``, for slides of ``lengths``."""
    pairs = 0
    for w, r in zip(segment_lengths, dilated_ratios, strict=True):
        phases = Counter(head // ceil(heads / r) for head in range(heads))
        for n in lengths:
            for segments, size in ((n // min(w, n), min(w, n)), (1, n % min(w, n))):
                runs = (count * max(0, ceil((size - phase) / r)) ** 2 for phase, count in phases.items())
                pairs += segments * sum(runs)
    return pairs


@lru_cache(maxsize=20)  # a few batches: rows of long ones are tens of megabytes
def lay_out(
    lengths: tuple[int, ...],
    w: int,
    r: int,
    heads: range,
    every: int,
    head_width: int,
    device: torch.device,
    compatible: bool = False,
) -> Branch:
    """The runs of branch (w, r) for packed slides of these lengths, grouped into calls. Cached: every layer asks again.

    ``heads`` are the ones at hand, of ``every`` head in all. Group g holds heads ``g * ceil(every / r)`` onwards, as in
    the public code; when r does not divide the heads, the last groups are smaller or empty. A slide shorter than w is
    one segment. ``compatible``: with `Call.padding`.
    """
    segments = []  # (first token, tokens, tokens missing)
    for start, n in zip(accumulate(lengths, initial=0), lengths, strict=False):
        segment = min(w, n)
        segments += [(start + at, min(segment, n - at), max(0, segment - (n - at))) for at in range(0, n, segment)]
    first, size, missing = np.array(segments).T
    if r == 1 and len(segments) <= MOST_RUNS:  # every segment is a run, in the order of the tokens
        padding = _padding(size, missing, device) if compatible else None
        return Branch(len(heads), [Call(None, _equal_runs(size), padding)], complete=True)

    # A run is (segment, head), its tokens r apart from the offset at which the head is active; runs by their lengths.
    own = np.arange(len(heads))
    phase = (own + heads.start) // ceil(every / r)
    length = np.maximum(0, -((phase - size[:, None]) // r)).flatten()  # ceil((size - phase) / r)
    order = np.argsort(length, kind="stable")[np.count_nonzero(length == 0) :]
    short = (-(-(size + missing) // r)[:, None] - length.reshape(len(size), -1)).flatten()[order]
    begin = ((first[:, None] + phase) * len(heads) + own).flatten()[order]
    length = length[order]
    rows = _arithmetic_runs(begin, length, r * len(heads), device)
    padding = _padding(length, short, device) if compatible else None
    # A CPU's kernel shares its work out by run, so a call has enough of them for every thread.
    together = torch.get_num_threads() if device.type == "cpu" else 1
    per_call = CALL_ELEMENTS.get(device.type, CALL_ELEMENTS["cuda"]) // head_width
    calls, start = [], 0
    for some in _cut(_equal_runs(length), per_call, together):
        stop = start + sum(count * tokens for count, tokens in some)
        calls.append(Call(rows[start:stop], tuple(some), None if padding is None else padding[start:stop]))
        start = stop
    # A row is one head of a token, though a group's heads move together: a kernel likes a head's tokens side by side.
    return Branch(1, calls, complete=False)


def _equal_runs(lengths: np.ndarray) -> tuple[EqualRuns, ...]:
    return tuple((len(list(same)), length) for length, same in groupby(lengths.tolist()))


def _arithmetic_runs(begin: np.ndarray, length: np.ndarray, step: int, device: torch.device) -> Tensor:
    """``begin, begin + step, …`` of each run, one run behind another.

    Computed on the device from a number or two a run: indices of all tokens are tens of megabytes, and a call for each
    run would keep a GPU waiting for its host.
    """
    before = np.cumsum(length) - length
    number = step * torch.arange(int(length.sum()), device=device)
    return number + repeated(torch.from_numpy(begin - step * before), length.tolist(), device)


def _padding(length: np.ndarray, missing: np.ndarray, device: torch.device) -> Tensor | None:
    """`Call.padding` of runs that lack so many tokens each; None where none are missing."""
    if not missing.any():
        return None
    with np.errstate(divide="ignore"):  # log 0 = -inf: nothing is added
        return repeated(torch.from_numpy(np.log(missing)), length.tolist(), device)[:, None]


def _cut(shapes: Sequence[EqualRuns], per_call: int, together: int) -> Iterator[list[EqualRuns]]:
    """Runs in order, cut into calls of at most ``per_call`` tokens and `MOST_RUNS`, or of ``together`` runs where their
    tokens are more."""
    call: list[EqualRuns] = []
    room = per_call
    for count, length in shapes:
        cost = max(length, ceil(per_call / MOST_RUNS))  # short runs count for more: a full call never has too many
        while count:
            fit = max(0, room // cost)
            some = count if count <= fit else fit // together * together
            if not some and call:
                yield call
                call, room = [], per_call
                continue
            some = some or min(count, together)
            if call and call[-1][1] == length:
                call[-1] = (call[-1][0] + some, length)
            else:
                call.append((some, length))
            count, room = count - some, room - some * cost
    if call:
        yield call


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _add(total: Tensor, rows: Tensor | None, part: Tensor) -> None:
    """``total[rows] += part``; a call's rows are distinct, so the order of the additions is no one's choice."""
    if rows is None:
        total += part
    else:
        total.index_add_(0, rows, part.to(total.dtype))


def _put(total: Tensor, rows: Tensor | None, part: Tensor) -> None:
    if rows is None:
        total.copy_(part)
    else:
        total.index_copy_(0, rows, part)


class _DilatedAttention(torch.autograd.Function):
    """All branches and their merge as one function, so that no branch's output has to be kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, branches: list[Branch], compatible: bool, kernel: StatisticsKernel
    ) -> Tensor:
        tokens, heads, width = q.shape
        precise = torch.promote_types(q.dtype, torch.float32)
        sofar: list[Tensor] = []  # output and LSE: a complete branch gives first values, others need some to add to
        if not branches[0].complete:
            sofar = [q.new_zeros(q.shape, dtype=precise), q.new_full((tokens, heads), -torch.inf, dtype=precise)]
        keep = compatible and any(ctx.needs_input_grad[:3])
        kept: list[Tensor] = []
        for branch in branches:
            units = (tokens * heads // branch.unit, branch.unit)
            for call in branch.calls:
                qs, ks, vs = (_take(x.view(*units, width), call.rows) for x in (q, k, v))
                part, part_lse = kernel.forward(qs, ks, vs, call.shapes)
                if compatible:
                    part, part_lse = _as_published(part, part_lse, call.padding)
                if keep:
                    kept += [part, part_lse]
                if not sofar:
                    sofar = [x.to(precise, copy=keep).contiguous() for x in (part.reshape(q.shape), part_lse)]
                    continue
                merged, statistic = sofar[0].view(*units, width), sofar[1].view(units)
                before, old = _take(statistic, call.rows), _take(merged, call.rows)
                after = torch.logaddexp(before, part_lse)
                old = old.mul_((before - after).exp_()[..., None])
                _put(merged, call.rows, old.addcmul_(part.to(precise), (part_lse - after).exp_()[..., None]))
                _put(statistic, call.rows, after)
        out, lse = sofar[0].to(q.dtype), sofar[1]
        ctx.branches, ctx.compatible, ctx.kernel = branches, compatible, kernel
        ctx.save_for_backward(q, k, v, lse, *(kept if compatible else [out]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse, *kept = ctx.saved_tensors
        tokens, heads, width = q.shape
        grad = grad.contiguous()
        totals = [] if ctx.branches[0].complete else [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
        results = iter(kept)
        for branch in ctx.branches:
            units = (tokens * heads // branch.unit, branch.unit)
            for call in branch.calls:
                gradient, qs, ks, vs = (_take(x.view(*units, width), call.rows) for x in (grad, q, k, v))
                statistic = _take(lse.view(units), call.rows)
                if ctx.compatible:  # out = Σ_b weight_b out_b with constant weights: each branch's own backward, scaled
                    part, part_lse = next(results), next(results)
                    gradient = gradient * (part_lse - statistic).exp()[..., None].to(grad.dtype)
                    shares = ctx.kernel.backward(gradient, qs, ks, vs, part, part_lse, call.shapes)
                else:
                    part = _take(kept[0].view(*units, width), call.rows)
                    shares = ctx.kernel.backward(gradient, qs, ks, vs, part, statistic, call.shapes)
                if not totals:
                    totals = [share.reshape(q.shape).to(lse.dtype).contiguous() for share in shares]
                    continue
                for total, share in zip(totals, shares, strict=True):
                    _add(total.view(*units, width), call.rows, share)
        dq, dk, dv = (total.to(q.dtype) for total in totals)
        return dq, dk, dv, None, None, None


def _as_published(part: Tensor, lse: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """A call's output and LSE as the public code has them.

    z zero keys score 0 and carry the value 0, so they only widen the softmax: ``lse' = logaddexp(lse, log z)``,
    ``out' = out exp(lse - lse')``. A branch whose LSE is exactly 0 is taken for absent and gets no weight.
    """
    if padding is not None:
        widened = torch.logaddexp(lse, padding.to(lse.dtype))
        part, lse = part * (lse - widened).exp()[..., None].to(part.dtype), widened
    return part, torch.where(lse == 0, -1e8, lse)
