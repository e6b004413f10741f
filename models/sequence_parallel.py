"""One slide on several processes: each holds a share of the tokens, and all of them for some of the heads in attention.

Norms and linears look at one token at a time, so they run on shares. Attention looks at one head at a time, so before
it an all-to-all trades tokens for heads, and after it heads for tokens (Jacobs et al. 2023, DeepSpeed Ulysses):

    process 0   tokens 0…, all heads  ─┐ all-to-all ┌─ all tokens, heads 0…  ── attention ──┐ all-to-all ┌─ tokens 0…, all heads
    process 1   tokens …T, all heads  ─┘            └─ all tokens, heads …H  ── attention ──┘            └─ tokens …T, all heads

Gradients are those of the *sum* of the processes' losses. Processes that all compute the same loss from the gathered
tokens therefore scale it by one over their number, and sum the gradients of parameters over the group; a mean over
all processes of a run, as sharded training takes it, does both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
"""The processes that share a slide; None where each has its own."""


@dataclass(frozen=True)
class TokenShare:
    """Which tokens of packed slides this process holds: a contiguous part, as even as it goes."""

    lengths: tuple[int, ...]  # tokens of each slide, all of them
    group: Group = None

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each process."""
        processes, tokens = processes_of(self.group), sum(self.lengths)
        edges = [tokens * i // processes for i in range(processes + 1)]
        return [stop - start for start, stop in pairwise(edges)]

    @cached_property
    def tokens(self) -> slice:
        """The tokens at hand, among all."""
        rank = 0 if self.group is None else dist.get_rank(self.group)
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    @cached_property
    def parts(self) -> list[tuple[int, slice]]:
        """The slides that the tokens at hand belong to, in order: (number, tokens of it)."""
        found = []
        for number, (first, n) in enumerate(zip(accumulate(self.lengths, initial=0), self.lengths, strict=False)):
            start, stop = max(self.tokens.start - first, 0), min(self.tokens.stop - first, n)
            if start < stop:
                found.append((number, slice(start, stop)))
        return found


def processes_of(group: Group) -> int:
    """How many processes share a slide."""
    return 1 if group is None else dist.get_world_size(group)


def check_sharing(heads: int, group: Group) -> None:
    """Raise ValueError unless the processes can have equally many heads."""
    processes = processes_of(group)
    if heads % processes:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"{heads} heads can't be shared evenly by {processes} processes: share a slide among"
            f" {', '.join(map(str, fitting))}"
        )


def scatter(x: Tensor, share: TokenShare) -> Tensor:
    """This process's tokens of ``x`` (T, …), which all processes have."""
    return x if share.group is None else x[share.tokens]


def gather(x: Tensor, share: TokenShare) -> Tensor:
    """All tokens (T, …), from this process's (t, …) and the others'."""
    return x if share.group is None else _Gather.apply(x, share)


def to_heads(x: Tensor, share: TokenShare) -> Tensor:
    """(t, n, heads, d), the tokens at hand → (T, n, heads / processes, d), the heads at hand."""
    return _Exchange.apply(x, share, _tokens_for_heads, _heads_for_tokens)


def to_tokens(x: Tensor, share: TokenShare) -> Tensor:
    """(T, n, heads / processes, d), the heads at hand → (t, n, heads, d), the tokens at hand."""
    return _Exchange.apply(x, share, _heads_for_tokens, _tokens_for_heads)


def heads_at_hand(heads: int, group: Group) -> tuple[int, int]:
    """The first of this process's heads, and how many there are in all."""
    return (0 if group is None else dist.get_rank(group) * heads // processes_of(group)), heads


def _tokens_for_heads(x: Tensor, share: TokenShare) -> Tensor:
    processes, (tokens, n, heads, d) = len(share.sizes), x.shape
    sent = x.unflatten(2, (processes, -1)).permute(2, 0, 1, 3, 4).contiguous()  # (processes, t, n, some heads, d)
    received = x.new_empty(sum(share.sizes), n, heads // processes, d)
    dist.all_to_all_single(received, sent.flatten(0, 1), share.sizes, [tokens] * processes, group=share.group)
    return received


def _heads_for_tokens(x: Tensor, share: TokenShare) -> Tensor:
    return _from_everyone(x, share).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _from_everyone(x: Tensor, share: TokenShare) -> Tensor:
    """(T, …), of all tokens → (processes, t, …): what every process has of the tokens at hand."""
    processes, tokens = len(share.sizes), share.tokens.stop - share.tokens.start
    received = x.new_empty(processes * tokens, *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), [tokens] * processes, share.sizes, group=share.group)
    return received.unflatten(0, (processes, tokens))


Exchange = Callable[[Tensor, TokenShare], Tensor]


class _Exchange(torch.autograd.Function):
    """One of the two exchanges, ``there``; the other, ``back``, is its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: TokenShare, there: Exchange, back: Exchange) -> Tensor:
        ctx.share, ctx.back = share, back
        return there(x, share)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.share), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: TokenShare) -> Tensor:
        ctx.share = share
        widest = max(share.sizes)  # collectives of one size run everywhere; the shares differ by one token at most
        sent = torch.cat([x, x.new_zeros(widest - len(x), *x.shape[1:])])
        received = [torch.empty_like(sent) for _ in share.sizes]
        dist.all_gather(received, sent, group=share.group)
        return torch.cat([part[:size] for part, size in zip(received, share.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Everyone's gradient of this process's tokens, summed."""
        return _from_everyone(grad, ctx.share).sum(dim=0), None
