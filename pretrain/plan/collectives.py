"""The collectives that a step really calls: what they are, among which processes, and what each of these sends."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from pretrain.plan.torch_internals import operator_name, ranks_of, tree_leaves

GATHERED, REDUCED, SUMMED = "allgather_base", "reduce_scatter_base", "allreduce"
"""What FSDP calls: parameters are gathered, gradients reduced into shards, and shards summed over replicas."""


class Collective(NamedTuple):
    """One kind of call."""

    name: str  # torch's own
    way: str  # forward or backward
    ranks: tuple[int, ...]  # that take part

    @property
    def once_a_step(self) -> bool:
        """Whether it comes after the last micro-batch alone, as gradients are reduced."""
        return self.way == "backward" and self.name in (REDUCED, SUMMED)


def collectives(function: Any, args: Any, way: str) -> Iterator[tuple[Collective, int]]:
    """What a dispatched function of torch's namespace ``c10d`` is, and the bytes that each of its processes sends
    around a ring: (n − 1) / n of the whole for an all-gather or a reduce-scatter, and twice that for an all-reduce,
    which is one after the other (Patarasu & Yuan 2009). Nothing for one that carries nothing, as a barrier."""
    ranks = ranks_of(args)
    whole = max(sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args)
    if ranks and whole:
        name = operator_name(function).strip("_")
        sent = whole * (len(ranks) - 1) // len(ranks)
        yield Collective(name, way, ranks), 2 * sent if name == SUMMED else sent
