"""How long a step's collectives take, and what of it the step's arithmetic hides.

A ring carries the bytes that each process sends at the bandwidth of its slowest link: a GPU's to the others of its
node, or, where the group spans nodes, what all of its members on a node have together of the network. Each step around
the ring also takes a while of its own, and an all-reduce of little climbs a tree instead: as NCCL chooses.

FSDP gathers a block's parameters while the one before computes, and reduces its gradients while the next one does. So
what a forward or a backward gathers and reduces is hidden as far as its arithmetic lasts, and what lasts longer is
*exposed*. A micro-batch hides what it gathers itself, and the last one what is reduced once a step. All else, an all-reduce of a loss say, is waited for. What a network gathers first and reduces last is waited
for too, and isn't counted: a block of it, of forty.
"""

from collections import Counter
from dataclasses import dataclass
from math import ceil, log2

from pretrain.plan.collectives import GATHERED, REDUCED, SUMMED, Collective
from pretrain.plan.estimate import Estimate
from pretrain.settings.hardware import Machine

REACHED = 0.78
"""Of a link's bandwidth: 350 of 450 GB/s between H100 (NCCL's authors, NVIDIA/nccl#986)."""

RING = (3.4e-6, 14e-6)
"""Seconds of a step around a ring, over NVLink and over a network: large messages in NCCL's ``tuning.cc``."""

TREE = (1.25e-6, 8.5e-6)
"""Of a step up or down a tree, by the same table."""


@dataclass
class Communication:
    """Of a step and process."""

    sent: dict[str, int]  # bytes, by collective and way
    calls: int
    seconds: float
    exposed: float  # seconds of these that nothing hides


def communication(found: Estimate, machine: Machine, per_node: int, computing: float) -> Communication:
    """What the collectives of ``found`` take on nodes of ``per_node`` processes, in a step that computes for
    ``computing`` seconds."""
    hidden = {"forward": 0.0, "backward": 0.0}
    reduced = waited = 0.0
    for one, calls in found.calls.items():
        seconds = collective_seconds(one, calls, found.sent[one], machine, per_node)
        if one.once_a_step:
            reduced += seconds
        elif one.name in (GATHERED, REDUCED):
            hidden[one.way] += seconds
        else:
            waited += seconds
    flops: Counter[str] = Counter()
    for (_, way), count in found.flops.items():
        flops["forward" if way == "forward" else "backward"] += count
    total = max(1, sum(flops.values()))
    beside = {way: computing * flops[way] / total for way in hidden}
    of_last = (hidden["backward"] - beside["backward"]) / found.accumulate + reduced
    others = 1 - 1 / found.accumulate
    exposed = (
        max(0.0, hidden["forward"] - beside["forward"])
        + max(0.0, hidden["backward"] - beside["backward"]) * others
        + max(0.0, of_last)
    )
    sent: Counter[str] = Counter()
    for one, size in found.sent.items():
        sent[f"{COLLECTIVE_TERMS.get(one.name, one.name)}, {one.way}"] += size
    calls = sum(count for one, count in found.calls.items() if len(one.ranks) > 1)
    return Communication(dict(sent), calls, sum(hidden.values()) + reduced + waited, exposed + waited)


COLLECTIVE_TERMS = {GATHERED: "all-gather", REDUCED: "reduce-scatter", SUMMED: "all-reduce"}


def collective_seconds(one: Collective, calls: int, sent: int, machine: Machine, per_node: int) -> float:
    """Seconds of so many ``calls``, in which each process sends ``sent`` bytes."""
    size, on_nodes = len(one.ranks), Counter(rank // per_node for rank in one.ranks)
    nodes = len(on_nodes)
    link = machine.intra_node_gb_s
    if nodes > 1:
        link = min(link, min(on_nodes.values()) * machine.inter_node_gb_s)
    across = nodes - 1
    ring = (size - 1 - across) * RING[0] + across * RING[1]
    if one.name == SUMMED:
        tree = 2 * (max(on_nodes.values()) - 1) * TREE[0] + 2 * ceil(log2(nodes)) * TREE[1]
        ring = min(2 * ring, tree)
    return sent / (REACHED * link * 1e9) + calls * ring
