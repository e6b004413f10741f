"""Held-out slides are judged once each: every rank passes a share of them forward, and all get the figures of all."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pretrain.run.across_ranks import total

Numbers = Sequence[int]


def own_passes(batches: Sequence[Numbers], rank: int, ranks: int) -> list[tuple[Numbers, bool]]:
    """A rank's share of ``batches``, and whether each counts.

    Every rank makes equally many passes, since each gathers parameters from all: where the batches don't divide, some
    ranks pass the last one again, for nothing.
    """
    rounds = -(-len(batches) // ranks)
    return [(batches[min(k, len(batches) - 1)], k < len(batches)) for k in range(rank, rounds * ranks, ranks)]


def rows_of_all(
    passes: Iterable[tuple[Numbers, bool]],
    judged: Callable[[Numbers], Mapping[str, Tensor]],
    numbers: Sequence[int],
    device: torch.device,
) -> dict[str, Tensor]:
    """What ``judged`` says of sequences by number, a row each, as rows ``(N, …)`` in float64 of all ``numbers``, in
    their order, on every rank's CPU."""
    place = {number: i for i, number in enumerate(numbers)}
    tables: dict[str, Tensor] = {}
    for some, counts in passes:
        for name, rows in judged(some).items():
            table = tables.setdefault(
                name, torch.zeros(len(numbers), *rows.shape[1:], dtype=torch.float64, device=device)
            )
            if counts:
                table[[place[number] for number in some]] = rows.double()
    return {name: total(table).cpu() for name, table in tables.items()}
