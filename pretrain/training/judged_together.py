"""Held-out slides are judged once each: every rank passes a share of them forward, and all get the figures of all."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from zlib import crc32

import torch
from torch import Tensor

from data.fault import Fault
from pretrain.run.across_ranks import gathered, total

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
    their order, on every rank's CPU. Raises Fault where it says other things of some than of others."""
    place = {number: i for i, number in enumerate(numbers)}
    tables: dict[str, Tensor] = {}
    forms: dict[str, torch.Size] | None = None
    for some, counts in passes:
        given = judged(some)
        shapes = {name: given[name].shape[1:] for name in sorted(given)}
        if forms is None:
            forms = shapes
            tables = {
                name: torch.zeros(len(numbers), *form, dtype=torch.float64, device=device)
                for name, form in forms.items()
            }
        if shapes != forms:
            raise Fault(
                f"{_differing(forms, shapes)}: 'judged' must give the same rows of every batch of held-out slides."
            )
        if counts:
            for name, rows in given.items():
                tables[name][[place[number] for number in some]] = rows.double()
    # One order on all ranks, so that the same rows are added up; ranks that have other rows would wait for ever.
    agreed = gathered(torch.tensor([crc32(repr(forms).encode())], device=device))
    if (agreed != agreed[0]).any():
        raise Fault("'judged' gives other rows on one process than on another: it must give the same of every batch.")
    return {name: total(table).cpu() for name, table in tables.items()}


def _differing(one: Mapping[str, torch.Size], other: Mapping[str, torch.Size]) -> str:
    """In words, how the rows of two batches differ."""
    name = next(name for name in sorted({*one, *other}) if one.get(name) != other.get(name))
    forms = [
        f"rows of shape {tuple(form)}" if (form := rows.get(name)) is not None else "nothing" for rows in (one, other)
    ]
    return f"{name} is {forms[0]} in one batch and {forms[1]} in another"
