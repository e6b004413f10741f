"""Attention that falls with distance on the slide: ALiBi in two dimensions, over packed slides, with exact gradients.

    out_i = Σ_j softmax_j(q_i · k_j / √d − slope_h · |p_i − p_j|) v_j

``|p_i − p_j|`` is the Euclidean distance of two tiles in units of a tile's side, and 0 where one of the two is a
special token (class, registers), which has no place (Press et al. 2022, ALiBi, for text; in two dimensions as MOOZY,
arXiv 2603.27048, has it). Pairs farther apart than an optional *reach* are cut off.

Neither scores nor bias are ever there for all pairs. A block of queries meets its keys some at a time, under a running
maximum and sum, and the backward computes the scores anew from their log-sum-exp (Dao et al. 2022, FlashAttention,
algorithms 1 and 4). Where there is a reach, tiles are sorted into squares of the grid,

    □ ▤ ▤ ▤ □     row by row: what the middle square can reach is one contiguous run of keys
    □ ▤ ■ ▤ □     in each row of squares, so a block of queries meets three runs of keys here,
    □ ▤ ▤ ▤ □     and the cost grows with tiles, not with their square

On CUDA the same is FlexAttention's (Dong et al. 2024), with the bias as its score modification and blocks of 128 tokens
skipped by their bounding boxes; the list of blocks has (tokens / 128)² numbers at most. **That path was never run on a
GPU.** On CPUs its modification, with gradients, its list of blocks, and its compiled forward are held to the path
above.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from math import ceil, inf, pi, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.flop_counter import register_flop_formula

from models.packed_slides import in_runs, numbers_of_slides, prepend

QUERIES = 256  # at a time: with `SCORES` this bounds what is there of the pairs
SCORES = 2**20  # of a block of queries and some of its keys, over all heads: small enough for a CPU's cache
SQUARE = 8  # cells a side
FLEX_BLOCK = 128  # tokens, FlexAttention's own
SQUARES_A_SIDE = 2**20  # squares that a slide may have along a side: 8 million cells


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """``(heads,)`` float32: ``2^(−8 i / n)``, i from 1, for n heads, a power of two; for other numbers the sequence of
    the next lower power, and then every second slope of the next higher one's (Press et al. 2022, section 3 and its
    authors' code)."""
    n = 1 << (heads.bit_length() - 1)
    first = -8 / n * torch.arange(1, n + 1, device=device, dtype=torch.float32)
    further = -4 / n * (2 * torch.arange(heads - n, device=device, dtype=torch.float32) + 1)
    return torch.cat([first, further]).exp2()


def check_reach(reach: Sequence[float] | None, heads: int) -> None:
    """Raise ValueError unless there is one reach for all heads, or one for each."""
    if reach and len(reach) not in (1, heads):
        raise ValueError(f"a reach is one number for all heads, or one for each of the {heads}")


@dataclass(frozen=True)
class DistanceLayout:
    """Where the tokens of packed slides lie, found once for all layers of a pass; see `lay_out_tokens`."""

    rows: Tensor | None  # (M,) of the tokens that attend, in the order of what follows; None: all, as they are
    lengths: tuple[int, ...]  # of them, per slide; its special ones come first
    special: int  # how many these are
    places: Tensor  # (M, 2) float32, in cells; those of special tokens mean nothing
    packed: tuple[int, ...]  # per slide, all tokens, also those that don't attend
    reach: tuple[float, ...]  # none, one for all heads, or one for each

    @cached_property
    def slides(self) -> Tensor:
        """(M,) the number of each token's slide."""
        return self._of_rows(numbers_of_slides(self.packed, self.places.device))

    @cached_property
    def is_tile(self) -> Tensor:
        """(M,) whether a token is a tile."""
        tiles = self.places.new_ones(sum(self.packed) - self.special * len(self.packed), dtype=torch.bool)
        none = self.places.new_zeros(self.special, dtype=torch.bool)
        return self._of_rows(prepend(none, tiles, [n - self.special for n in self.packed]))

    def _of_rows(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x.index_select(0, self.rows)

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's blocks of `FLEX_BLOCK` tokens that may have pairs: those of one slide, and within reach by
        their bounding boxes, or with a special token."""
        blocks = -(-len(self.places) // FLEX_BLOCK)
        missing = blocks * FLEX_BLOCK - len(self.places)

        def of_blocks(x: Tensor, end: Callable[..., Tensor], filling: float) -> Tensor:
            padded = torch.cat([x, x.new_full((missing, *x.shape[1:]), filling)])
            return end(padded.unflatten(0, (blocks, FLEX_BLOCK)), dim=1)

        first, last = of_blocks(self.slides, torch.amin, len(self.lengths)), of_blocks(self.slides, torch.amax, -1)
        near = (first[:, None] <= last) & (first <= last[:, None])
        if self.reach:
            tile = self.is_tile[:, None]
            lower = of_blocks(torch.where(tile, self.places, torch.inf), torch.amin, torch.inf)
            upper = of_blocks(torch.where(tile, self.places, -torch.inf), torch.amax, -torch.inf)
            gap = torch.maximum(lower[:, None] - upper, lower - upper[:, None]).clamp(min=0)
            meets_all = of_blocks((~self.is_tile).int(), torch.amax, 0).bool()
            near &= (gap.square().sum(-1).sqrt() <= max(self.reach)) | meets_all[:, None] | meets_all
        counts = near.sum(-1, dtype=torch.int32)
        numbers = near.int().argsort(dim=-1, descending=True, stable=True).int()
        size, slides, several, distance = len(self.places), self.slides, len(self.reach) > 1, self.distance_of()
        # Filled by the device: it would be waited for, to copy a list to it.
        cuts = [torch.full((1,), float(one), device=slides.device) for one in self.reach]
        reach = torch.cat(cuts) if cuts else None

        def together(_: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = slides[i] == slides[j]
            return same if reach is None else same & (distance(i, j) <= reach[head if several else 0])

        return BlockMask.from_kv_blocks(
            counts[None, None],
            numbers[None, None],
            BLOCK_SIZE=FLEX_BLOCK,
            mask_mod=together,
            seq_lengths=(size, size),
        )

    def distance_of(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What gives the distance of tokens by their numbers: a function of tensors, element by element, as
        FlexAttention compiles it."""
        (x, y), tile = self.places.mT.contiguous().unbind(), self.is_tile

        def distance(i: Tensor, j: Tensor) -> Tensor:
            apart = ((x[i] - x[j]) ** 2 + (y[i] - y[j]) ** 2).sqrt()
            return torch.where(tile[i] & tile[j], apart, 0.0)

        return distance


def lay_out_tokens(
    cells: Tensor,
    lengths: Sequence[int],
    special: int,
    reach: Sequence[float] | None = None,
    valid: Tensor | None = None,
    valid_lengths: Sequence[int] | None = None,
) -> DistanceLayout:
    """For `distance_attention`: slides of ``lengths`` tokens, of which the first ``special`` are no tiles.

    cells: (tiles, 2) of all slides, in units of a tile's side, whole or not. reach: cells beyond which pairs are cut
    off. valid: (tiles,) bool, False for cells without a tile, which are cut off from all others. valid_lengths: how many
    are valid of each slide; where it isn't said they are counted, for which a GPU is waited for.
    """
    tiles = [n - special for n in lengths]

    def with_special(x: Tensor, token: float) -> Tensor:
        return prepend(x.new_full((special, *x.shape[1:]), token), x, tiles)

    packed, places, rows = tuple(lengths), with_special(cells.float(), 0), None
    if valid is not None:
        if valid_lengths is None:
            valid_lengths = torch.cat([run.sum(1) for run in in_runs(valid, tiles)]).tolist()
        lengths = [special + n for n in valid_lengths]
        # Valid ones first, in order: how many a nonzero() found would be waited for.
        rows = with_special(valid, True).int().argsort(descending=True, stable=True)[: sum(lengths)]
        places = places[rows]
    layout = DistanceLayout(rows, tuple(lengths), special, places, packed, tuple(reach or ()))
    if not reach:
        return layout
    order = _squares(layout).argsort(stable=True)
    return replace(layout, rows=order if rows is None else rows[order], places=places[order])


def distance_attention(q: Tensor, k: Tensor, v: Tensor, layout: DistanceLayout, slopes: Tensor) -> Tensor:
    """Attention of packed slides, biased by distance: ``(T, heads, head_width)`` each → ``(T, heads, head_width)``.

    Slides don't see each other; a token that the layout leaves out sees itself alone. slopes: ``(heads,)``, per cell;
    they learn. Statistics are float32 or better. Raises ValueError where the layout is of other tokens.
    """
    if (len(q) if layout.rows is None else len(layout.rows)) != sum(layout.lengths) or len(slopes) != q.shape[1]:
        raise ValueError(f"a layout of slides of {list(layout.lengths)} tokens does not fit {len(q)} of them")
    slopes = slopes.to(torch.promote_types(q.dtype, torch.float32))
    if layout.rows is None:
        return _attend(q, k, v, layout, slopes)
    some_q, some_k, some_v = (x.index_select(0, layout.rows) for x in (q, k, v))
    return v.index_copy(
        0, layout.rows, _attend(some_q, some_k, some_v, layout, slopes)
    )  # a softmax over oneself is one


def seen_pairs(lengths: Sequence[int], special: int, reach: Sequence[float], heads: int) -> float:
    """Pairs of a query and a key over all heads, for slides of ``lengths`` tokens: all of a slide, or of each tile
    those within reach where it has tiles on all sides, which is an estimate."""
    around = [pi * (one + 0.5) ** 2 for one in reach] or [inf]  # a circle's tiles
    tiles = [n - special for n in lengths]
    everything = heads * sum(n**2 for n in lengths)
    return everything - heads // len(around) * sum(n * (n - min(n, area)) for n in tiles for area in around)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: DistanceLayout, slopes: Tensor) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):  # which would take statistics down to 16 bits
        if q.device.type == "cuda" and q.dtype != torch.float64:  # which FlexAttention doesn't take
            return flex_distances(q, k, v, layout, slopes, compiled_flex())
        arguments = layout.places, slopes, list(layout.lengths), layout.special, list(layout.reach)
        return _blocks(q, k, v, *arguments)[0]


def flex_distances(
    q: Tensor, k: Tensor, v: Tensor, layout: DistanceLayout, slopes: Tensor, attend: Callable[..., Any] = flex_attention
) -> Tensor:
    """`distance_attention` of a layout's own tokens by FlexAttention, which without torch.compile holds all pairs."""
    distance = layout.distance_of()

    def biased(score: Tensor, _: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[head] * distance(i, j)

    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attend(*heads_first, score_mod=biased, block_mask=layout.block_mask)[0].transpose(0, 1)


@lru_cache
def compiled_flex(backend: str = "inductor") -> Callable[..., Any]:
    """FlexAttention, compiled for slides of any lengths; it raises where it can't be, since torch would else go on with
    all pairs at once. Each width, precision and kind of pass is compiled by itself, short slides too."""
    return torch.compile(  # type: ignore[call-overload, no-any-return]
        flex_attention, dynamic=True, fullgraph=True, recompile_limit=64, backend=backend
    )


@torch.library.custom_op("slidewright::distance_attention", mutates_args=())
def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    slopes: Tensor,
    lengths: list[int],
    special: int,
    reach: list[float],
) -> tuple[Tensor, Tensor]:
    """Output (T, heads, head_width) and log-sum-exp (heads, T). One operator: a plan counts it as one, and activation
    checkpointing keeps its result."""
    precise = slopes.dtype
    qs, ks, vs = _heads_first(q.shape[2] ** -0.5, precise, q, k, v)
    places, cut = places.to(precise), _as_tensor(reach, slopes)
    out, lse = torch.empty_like(qs), qs.new_empty(qs.shape[:2])
    for first, queries, runs in _work(places, lengths, special, reach, len(slopes)):
        some = qs[:, queries]
        largest = some.new_full(some.shape[:2], torch.finfo(precise).min)  # finite: keys may all be out of reach so far
        total, sofar = torch.zeros_like(largest), torch.zeros_like(some)
        for keys in runs:
            scores = _scores(some, ks[:, keys], _distances(places, first, queries, keys), slopes, cut)
            larger = torch.maximum(largest, scores.amax(dim=-1))
            shrunk = largest.sub_(larger).exp_()
            weights = scores.sub_(larger[..., None]).exp_()
            total.mul_(shrunk).add_(weights.sum(dim=-1))
            sofar = torch.baddbmm(sofar.mul_(shrunk[..., None]), weights, vs[:, keys])
            largest = larger
        out[:, queries] = sofar.div_(total[..., None])
        lse[:, queries] = total.log_().add_(largest)
    return out.transpose(0, 1).to(q.dtype).contiguous(), lse


@torch.library.custom_op("slidewright::distance_attention_backward", mutates_args=())
def _blocks_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    places: Tensor,
    slopes: Tensor,
    lengths: list[int],
    special: int,
    reach: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the slopes: the scores anew, ``P = exp(s − lse)``, ``dS = P ∘ (dO Vᵀ − rowsum(dO ∘
    O))``, and a slope's is ``−Σ dS · distance``."""
    scale = q.shape[2] ** -0.5
    qs, ks, vs, grads, outs = (*_heads_first(scale, slopes.dtype, q, k, v), *_heads_first(1.0, slopes.dtype, grad, out))
    places, cut = places.to(slopes.dtype), _as_tensor(reach, slopes)
    shared = (grads * outs).sum(dim=-1, keepdim=True)
    dq, dk, dv = (torch.zeros_like(x) for x in (qs, ks, vs))
    dslopes = torch.zeros_like(slopes)
    for first, queries, runs in _work(places, lengths, special, reach, len(slopes)):
        some, upstream = qs[:, queries], grads[:, queries]
        for keys in runs:
            distances = _distances(places, first, queries, keys)
            weights = _scores(some, ks[:, keys], distances, slopes, cut).sub_(lse[:, queries, None]).exp_()
            dv[:, keys] += weights.mT @ upstream
            ds = (upstream @ vs[:, keys].mT).sub_(shared[:, queries]).mul_(weights)
            dq[:, queries] += ds @ ks[:, keys]
            dk[:, keys] += ds.mT @ some
            dslopes -= ds.flatten(1) @ distances.flatten()
    found = (x.transpose(0, 1).to(q.dtype).contiguous() for x in (dq.mul_(scale), dk, dv))
    return (*found, dslopes)  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, places, slopes, *ctx.layout = inputs
    ctx.save_for_backward(q, k, v, *output, places, slopes)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dslopes = _blocks_backward(grad, *ctx.saved_tensors, *ctx.layout)
    return dq, dk, dv, None, dslopes, None, None, None


_blocks.register_autograd(_differentiate, setup_context=_remember)


@_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, places: Tensor, slopes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), slopes.new_empty(q.shape[1], q.shape[0])


@_blocks_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, places: Tensor, slopes: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(slopes)


@register_flop_formula(torch.ops.slidewright.distance_attention)
def _operations(q: Sequence[int], *rest: Any, out_shape: Any = None, **_: Any) -> int:
    lengths, special, reach = rest[-3:]
    return round(4 * seen_pairs(lengths, special, reach, q[1]) * q[2])


@register_flop_formula(torch.ops.slidewright.distance_attention_backward)
def _operations_backward(_: Any, q: Sequence[int], *rest: Any, out_shape: Any = None, **__: Any) -> int:
    lengths, special, reach = rest[-3:]
    return round(10 * seen_pairs(lengths, special, reach, q[1]) * q[2])


def _heads_first(scale: float, precise: torch.dtype, q: Tensor, *rest: Tensor) -> list[Tensor]:
    """(T, heads, head_width) → (heads, T, head_width), the first one scaled."""
    return [(q.transpose(0, 1).to(precise) * scale).contiguous()] + [
        x.transpose(0, 1).to(precise).contiguous() for x in rest
    ]


def _as_tensor(reach: Sequence[float], like: Tensor) -> Tensor | None:
    return like.new_tensor(reach)[:, None, None] if reach else None


def _distances(places: Tensor, first: int, queries: slice, keys: slice) -> Tensor:
    """(queries, keys), 0 where one is a special token: those before ``first``."""
    (x, y), (of_x, of_y) = places[queries].unbind(1), places[keys].unbind(1)
    distances = (x[:, None] - of_x).square_().add_((y[:, None] - of_y).square_()).sqrt_()
    distances[: max(0, first - queries.start)] = 0
    distances[:, : max(0, first - keys.start)] = 0
    return distances


def _scores(q: Tensor, k: Tensor, distances: Tensor, slopes: Tensor, reach: Tensor | None) -> Tensor:
    """(heads, queries, keys), of queries that are scaled already."""
    scores = torch.bmm(q, k.mT).addcmul_(distances, slopes[:, None, None], value=-1)
    return scores if reach is None else scores.masked_fill_(distances > reach, -torch.inf)


def _work(
    places: Tensor, lengths: Sequence[int], special: int, reach: Sequence[float], heads: int
) -> Iterator[tuple[int, slice, list[slice]]]:
    """All pairs that aren't out of reach: of each slide its first tile, a block of queries, and runs of keys."""
    most = max(1, SCORES // (heads * QUERIES))
    for start, n in zip(accumulate(lengths, initial=0), lengths, strict=False):
        first, stop = start + special, start + n
        everything = _cut(start, stop, most)
        for queries in _cut(start, first if reach else stop, QUERIES):
            yield first, queries, everything
        if reach and first < stop:
            for begin, end, runs in _within_reach(places[first:stop], max(reach)):
                keys = [part for a, b in runs for part in _cut(first + a, first + b, most)]
                for queries in _cut(first + begin, first + end, QUERIES):
                    yield first, queries, [*_cut(start, first, most), *keys]


def _cut(start: int, stop: int, most: int) -> list[slice]:
    return [slice(a, min(a + most, stop)) for a in range(start, stop, most)]


def _within_reach(places: Tensor, reach: float) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Each square's tiles, and the runs of tiles, one for each row of squares, that some of them may reach; ``places``
    are of a slide's tiles, sorted by `_squares`."""
    of_tiles = (places / SQUARE).floor().long().cpu().numpy() @ np.array([1, 2 * SQUARES_A_SIDE])
    squares, starts = np.unique(of_tiles, return_index=True)
    edges = np.append(starts, len(of_tiles))
    most, runs = ceil(reach / SQUARE), []
    for rows in range(-most, most + 1):
        # Tiles of squares that are so many rows apart are farther apart than this, unless their rows are neighbours.
        between = SQUARE * max(0, abs(rows) - 1)
        columns = ceil(sqrt(reach**2 - between**2) / SQUARE)
        middle = squares + 2 * SQUARES_A_SIDE * rows
        begin, end = np.searchsorted(squares, middle - columns), np.searchsorted(squares, middle + columns, "right")
        runs.append((edges[begin], edges[end]))
    found = np.array(runs)  # (rows, begin or end, squares)
    for number in range(len(squares)):
        some = [(int(a), int(b)) for a, b in found[:, :, number] if a < b]
        yield int(edges[number]), int(edges[number + 1]), some


def _squares(layout: DistanceLayout) -> Tensor:
    """(M,) int64 that sort tokens by slide, special ones first, then squares of the grid, row by row."""
    column, row = (layout.places / SQUARE).floor().long().unbind(1)
    number = (row + SQUARES_A_SIDE) * 2 * SQUARES_A_SIDE + column + SQUARES_A_SIDE
    return layout.slides * (2 * SQUARES_A_SIDE) ** 2 + torch.where(layout.is_tile, number, -1)
