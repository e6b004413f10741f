"""Dilated attention (LongNet, Ding et al. 2023) over packed slides of any lengths, without padding, with exact gradients.

A branch (w, r) cuts a sequence into segments of w tokens and lets each head see every r-th token of its segment: the
heads are split into r groups, and group g attends among the tokens whose offset in the segment is ≡ g (mod r). So in one
branch a token is active in one group of heads, and the branch is a *permutation* of the tokens into runs, each run one
small dense attention:

    segment of w = 8, r = 2, four heads      tokens 0 1 2 3 4 5 6 7
    heads 0, 1                               run    0 . 2 . 4 . 6 .
    heads 2, 3                               run    . 1 . 3 . 5 . 7

Branches are merged by their log-sum-exp (LSE), as one softmax over all the keys a token saw (a key seen by two branches
counts twice):

    LSE = log Σ_b exp(lse_b)        out = Σ_b exp(lse_b - LSE) out_b

and the gradient of that softmax, branch by branch, is the stock attention backward with the merged ``out`` and ``LSE``.

The public code treats the weights ``exp(lse_b - LSE)`` as constants in the backward, and lets queries attend to the zero
padding of incomplete segments. A model trained that way needs both to give the same numbers: ``compatible=True``.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil, gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.attention_statistics import attend, attend_backward

CALL_ELEMENTS = 2**22  # elements of q in one attention call: bounds what a branch holds beside its input and output


@dataclass(frozen=True)
class Runs:
    """Runs of equal length that go through attention in one call."""

    rows: slice | Tensor  # which rows of the (tokens * units, unit heads, head_width) view, run by run
    count: int  # runs
    length: int  # tokens in each
    padding: Tensor | None  # (count, 1, 1) log of the number of zero keys the public code adds; None where it adds none


@dataclass(frozen=True)
class Branch:
    """One (segment length, ratio) of a schedule, laid out for slides of given lengths."""

    unit: int  # heads that move together; a token's heads are heads / unit such units
    calls: list[Runs]


def check_schedule(segment_lengths: Sequence[int], dilated_ratios: Sequence[int]) -> None:
    """Raise ValueError, naming the nearest valid schedule, unless every ratio divides its segment length.

    Where it doesn't, the groups of a segment have different numbers of tokens, and the public code then writes outputs to
    other tokens than the queries they came from (w = 10, r = 4: output 12 belongs to query 10).
    """
    if len(segment_lengths) != len(dilated_ratios) or not segment_lengths:
        raise ValueError(
            f"segment_lengths {list(segment_lengths)} and dilated_ratios {list(dilated_ratios)} must pair up, one ratio per length"
        )
    if min(*segment_lengths, *dilated_ratios) < 1:
        raise ValueError(f"segment lengths {list(segment_lengths)} and ratios {list(dilated_ratios)} must be positive")
    if any(w % r for w, r in zip(segment_lengths, dilated_ratios, strict=True)):
        nearest = [max(r, round(w / r) * r) for w, r in zip(segment_lengths, dilated_ratios, strict=True)]
        raise ValueError(
            f"segment lengths {list(segment_lengths)} are not all multiples of their dilated ratios {list(dilated_ratios)}; "
            f"the nearest valid lengths are {nearest}"
        )


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    compatible: bool = False,
) -> Tensor:
    """Dilated attention of packed sequences: (tokens, heads, head_width) each → (tokens, heads, head_width).

    ``lengths`` are the tokens of each slide, in the order in which they are packed; slides do not see each other. Gradients
    are exact, or those of the public code when ``compatible``. A token that no branch makes active (possible only
    when the ratios' groups are more than the heads) gives zeros.

    Raises ValueError when the lengths don't add up, or when a slide is longer than a segment whose ratio doesn't divide it.
    """
    if sum(lengths) != q.shape[0] or min(lengths, default=0) < 1:
        raise ValueError(f"slides of {list(lengths)} tokens do not make up the {q.shape[0]} packed ones")
    longest = max(lengths)
    reached = [(w, r) for w, r in zip(segment_lengths, dilated_ratios, strict=True) if longest > w]
    if reached:
        check_schedule(*zip(*reached, strict=True))
    branches = [
        lay_out(tuple(lengths), w, r, q.shape[1], q.shape[2], q.device)
        for w, r in zip(segment_lengths, dilated_ratios, strict=True)
    ]
    return _DilatedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), branches, compatible)


@lru_cache(maxsize=64)
def lay_out(lengths: tuple[int, ...], w: int, r: int, heads: int, head_width: int, device: torch.device) -> Branch:
    """The runs of branch (w, r) for packed slides of these lengths, grouped into calls. Cached: every layer asks again.

    Group g holds heads ``g * ceil(heads / r)`` onwards, as in the public code; when r does not divide the heads, the last
    groups are smaller or empty. A slide shorter than w is one segment.
    """
    group = ceil(heads / r)
    unit = gcd(group, heads)
    per_call = max(1, CALL_ELEMENTS // (unit * head_width))  # tokens
    segments = []  # (first token, segments, tokens in each, tokens missing from each)
    for start, n in zip(accumulate(lengths, initial=0), lengths, strict=False):
        segment = min(w, n)
        full, rest = divmod(n, segment)
        segments.append((start, full, segment, 0))
        if rest:
            segments.append((start + full * segment, 1, rest, segment - rest))
    if r == 1:
        return Branch(unit, _slices(segments, per_call, device))
    return Branch(unit, _permutation(segments, r, heads // unit, group // unit, per_call, device))


def _slices(segments: list[tuple[int, int, int, int]], per_call: int, device: torch.device) -> list[Runs]:
    """Ratio 1: every segment is a run, and neighbouring runs of equal length are a slice of the packed tokens."""
    merged: list[tuple[int, int, int, int]] = []
    for first, count, length, missing in segments:
        if merged and merged[-1][2:] == (length, missing) and merged[-1][0] + merged[-1][1] * length == first:
            first, count = merged[-1][0], merged.pop()[1] + count
        merged.append((first, count, length, missing))
    calls = []
    for first, count, length, missing in merged:
        step = max(1, per_call // length)
        for run in range(0, count, step):
            some = min(step, count - run)
            rows = slice(first + run * length, first + (run + some) * length)
            calls.append(Runs(rows, some, length, _log_padding(torch.full((some,), missing), device)))
    return calls


def _permutation(
    segments: list[tuple[int, int, int, int]],
    r: int,
    units: int,
    units_in_group: int,
    per_call: int,
    device: torch.device,
) -> list[Runs]:
    """Ratio r > 1: a run is (segment, unit of heads), its tokens r apart; runs of equal length share a call."""
    phase = torch.arange(units) // units_in_group  # the offset mod r at which each unit of heads is active
    found: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(
        list
    )  # run length → rows (runs, length), missing (runs,)
    for first, count, size, missing in segments:
        padded = ceil((size + missing) / r)
        for extra in (1, 0):  # phases below size % r meet one token more than the others
            unit = (phase < size % r if extra else phase >= size % r).nonzero()[:, 0]
            length = size // r + extra
            if len(unit) == 0 or length == 0:
                continue
            token = torch.arange(count)[:, None, None] * size + torch.arange(length) * r + phase[unit][:, None]
            rows = ((first + token) * units + unit[:, None]).flatten(0, 1)  # (segments * units, length)
            found[length].append((rows, torch.full((len(rows),), padded - length)))
    calls = []
    for length, parts in found.items():
        rows, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
        step = max(1, per_call // length)
        for some, missing_keys in zip(rows.split(step), zeros.split(step), strict=True):
            calls.append(Runs(some.flatten().to(device), len(some), length, _log_padding(missing_keys, device)))
    return calls


def _log_padding(zeros: Tensor, device: torch.device) -> Tensor | None:
    return zeros.double().log().view(-1, 1, 1).to(device) if zeros.any() else None


def _take(x: Tensor, runs: Runs) -> Tensor:
    """The rows of (rows, heads, head_width) that a call needs, as (runs, heads, length, head_width)."""
    some = x[runs.rows] if isinstance(runs.rows, slice) else x.index_select(0, runs.rows)
    return some.unflatten(0, (runs.count, runs.length)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """The inverse of `_take`'s reshaping: (runs, heads, length, …) → (rows, heads, …)."""
    return x.transpose(1, 2).flatten(0, 1)


def _add(total: Tensor, runs: Runs, part: Tensor) -> None:
    """``total[rows] += part``; a call's rows are distinct, so this is a gather, a sum and a copy."""
    if isinstance(runs.rows, slice):
        total[runs.rows] += part
    else:
        total.index_copy_(0, runs.rows, total.index_select(0, runs.rows).add_(part))


def _put(total: Tensor, runs: Runs, part: Tensor) -> None:
    if isinstance(runs.rows, slice):
        total[runs.rows] = part
    else:
        total.index_copy_(0, runs.rows, part)


class _DilatedAttention(torch.autograd.Function):
    """All branches and their merge as one function, so that no branch's output has to be kept for the backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, branches: list[Branch], compatible: bool) -> Tensor:
        tokens, heads, width = q.shape
        precise = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((tokens, heads, width), dtype=precise)
        lse = q.new_full((tokens, heads), -torch.inf, dtype=precise)
        kept: list[Tensor] = []
        for branch in branches:
            units = (tokens * heads // branch.unit, branch.unit)
            merged, statistic = out.view(*units, width), lse.view(units)
            for runs in branch.calls:
                part, part_lse = attend(*(_take(x.view(*units, width), runs) for x in (q, k, v)))
                if compatible:
                    part, part_lse = _as_published(part, part_lse, runs.padding)
                    kept += [part, part_lse]
                part, part_lse = _rows(part), _rows(part_lse)
                before = statistic[runs.rows]
                after = torch.logaddexp(before, part_lse)
                old = merged[runs.rows] * (before - after).exp_()[..., None]
                _put(merged, runs, old.addcmul_(part.to(precise), (part_lse - after).exp_()[..., None]))
                _put(statistic, runs, after)
        out = out.to(q.dtype)
        ctx.branches, ctx.compatible = branches, compatible
        ctx.save_for_backward(q, k, v, lse, *(kept if compatible else [out]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse, *kept = ctx.saved_tensors
        tokens, heads, width = q.shape
        grad = grad.contiguous()
        totals = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
        results = iter(kept)
        for branch in ctx.branches:
            units = (tokens * heads // branch.unit, branch.unit)
            for runs in branch.calls:
                qs, ks, vs = (_take(x.view(*units, width), runs) for x in (q, k, v))
                gradient, statistic = _take(grad.view(*units, width), runs), _take(lse.view(units), runs)
                if ctx.compatible:  # out = Σ_b weight_b out_b with constant weights: each branch's own backward, scaled
                    part, part_lse = next(results), next(results)
                    gradient = gradient * (part_lse - statistic).exp()[..., None].to(grad.dtype)
                    shares = attend_backward(gradient, qs, ks, vs, part, part_lse)
                else:
                    shares = attend_backward(gradient, qs, ks, vs, _take(kept[0].view(*units, width), runs), statistic)
                for total, share in zip(totals, shares, strict=True):
                    _add(total.view(*units, width), runs, _rows(share))
        dq, dk, dv = (total.to(q.dtype) for total in totals)
        return dq, dk, dv, None, None


def _as_published(part: Tensor, lse: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """A call's output and LSE as the public code has them.

    z zero keys score 0 and carry the value 0, so they only widen the softmax: ``lse' = logaddexp(lse, log z)``,
    ``out' = out exp(lse - lse')``. A branch whose LSE is exactly 0 is taken for absent and gets no weight.
    """
    if padding is not None:
        widened = torch.logaddexp(lse, padding.to(lse.dtype))
        part, lse = part * (lse - widened).exp()[..., None].to(part.dtype), widened
    return part, torch.where(lse == 0, -1e8, lse)
