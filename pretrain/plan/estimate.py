"""From rehearsals to the bill of one process: operations by part, memory by part at the step's highest moment, and
what it sends to others.

A network of many equal blocks is rehearsed with few: two blocks, and a third, tell about forty. Operations grow by
exactly the same amount with each further block, memory nearly (where its highest moment lies elsewhere in the shallower
network, by some of a block's); a test holds both to whole rehearsals.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import ceil, prod

import torch
from torch import nn

from pretrain.plan.collectives import Collective
from pretrain.plan.rehearsal import OF_THE_BATCH, Rehearsal, rehearse
from pretrain.plan.run_shape import RunShape
from pretrain.training.trainer_settings import PRECISIONS

COUNTED = ("flops", "calls", "sent", "work")  # of a rehearsal
FEW = 2  # blocks that are rehearsed of more; and then one more


@dataclass(frozen=True)
class Settings:
    """The settings of a run that a plan may propose to change."""

    processes: int
    shard_size: int
    precision: str
    checkpointing: str
    accumulate: int
    together: int = 1  # processes that share each slide


@dataclass
class Estimate:
    """Of one process; computed, not measured."""

    samples: float  # of a step; of those that processes share, each has its part
    flops: Counter[tuple[str, str]]  # of a step, by (part, forward, backward or again)
    held: dict[str, int]  # bytes held all the time, by part
    highest: dict[str, int]  # bytes at the highest moment, by part, those held all the time among them
    calls: Counter[Collective] = field(default_factory=Counter)  # of a step
    sent: Counter[Collective] = field(default_factory=Counter)  # bytes of a step
    operators: int = 0  # of a step, that start kernels
    moved: int = 0  # bytes of a step that kernels read and write, products and attention left out
    workspace: int = 0  # bytes of attention's backward, beside
    augmentation: int = 0  # bytes before the forward, beside the batch
    accumulate: int = 1  # micro-batches of a step

    @property
    def peak(self) -> int:
        """Bytes at the highest moment of a step."""
        return sum(self.highest.values())


def estimate(run: RunShape, settings: Settings, fused_attention: bool, largest: bool = True) -> Estimate:
    """Rehearse a step of ``run`` under these settings. Raises Fault where they don't divide."""
    batch = run.batch(settings.processes, settings.accumulate, largest, settings.together)

    def of(depths: dict[tuple[str, str], int]) -> Rehearsal:
        return rehearse(
            run.build(depths),
            batch,
            processes=settings.processes,
            shard_size=settings.shard_size,
            precision=settings.precision,
            checkpointing=settings.checkpointing,
            fused_attention=fused_attention,
            together=settings.together,
        )

    seen = _deepened(run, of)

    def of_all_parts(counts: Counter) -> Counter:
        once = {key for key in counts if isinstance(key, Collective) and key.once_a_step}
        times = {key: (1, 1) if key in once else (settings.accumulate, batch.parts) for key in counts}
        return Counter({key: count * times[key][0] // times[key][1] for key, count in counts.items()})

    waiting = (settings.accumulate - batch.parts) * seen.phases[0].get(OF_THE_BATCH, 0) // batch.parts
    held = held_all_the_time(run, settings)
    gradients = held.pop("gradients")
    # What grows through a step, beside the moment at which it is over and the optimiser has all gradients.
    moments = [phase | {OF_THE_BATCH: phase.get(OF_THE_BATCH, 0) + waiting} for phase in seen.phases] + [
        {"gradients": gradients}
    ]
    # A micro-batch is augmented while those before it are there already.
    augmentation = run.augmentation(batch.samples) if fused_attention else 0
    moments.append({OF_THE_BATCH: seen.phases[0].get(OF_THE_BATCH, 0) + waiting, "augmentation": augmentation})
    highest = max(moments, key=lambda phase: sum(phase.values()))
    named = {name: size for name, size in (held | highest).items() if size}
    work = of_all_parts(seen.work)
    return Estimate(
        batch.samples * settings.accumulate / settings.together,
        of_all_parts(seen.flops),
        held | {"gradients": gradients},
        named,
        calls=of_all_parts(seen.calls),
        sent=of_all_parts(seen.sent),
        operators=work["operators"],
        moved=work["bytes"],
        workspace=seen.workspace,
        augmentation=augmentation,
        accumulate=settings.accumulate,
    )


def _deepened(run: RunShape, of: Callable[[dict[tuple[str, str], int]], Rehearsal]) -> Rehearsal:
    deep = {key: depth for key, depth in run.depths.items() if depth > FEW + 1}
    few = {key: min(depth, FEW) if key in deep else depth for key, depth in run.depths.items()}
    first = of(few)
    counts = {name: Counter(getattr(first, name)) for name in COUNTED}
    phases = [Counter(phase) for phase in first.phases]
    for key, depth in deep.items():
        more = of(few | {key: FEW + 1})
        times = depth - FEW
        for name, total in counts.items():
            before, after = getattr(first, name), getattr(more, name)
            for part in after:
                total[part] += times * (after[part] - before[part])
        for total, before, after in zip(phases, first.phases, more.phases, strict=True):
            for kind in before.keys() | after.keys():
                total[kind] += times * (after.get(kind, 0) - before.get(kind, 0))
    # Where the highest moment lies elsewhere in the shallower of the two, a small part may come out below nothing.
    return Rehearsal(
        phases=[{kind: max(0, size) for kind, size in phase.items()} for phase in phases],
        workspace=first.workspace,
        **counts,
    )


def held_all_the_time(run: RunShape, settings: Settings) -> dict[str, int]:
    """Bytes of the first process's shards by part, ``gradients`` (held from backward to step) among them."""
    with torch.device("meta"):
        objective = run.build()()
    masters = PRECISIONS[settings.precision].masters.itemsize
    trained, frozen = list(objective.trained().items()), list(objective.frozen().values())
    found: Counter[str] = Counter()
    for name, network in trained:
        what = "encoder" if name == "encoder" else "decoder" if name == "decoder" else "heads and prototypes"
        found[f"parameters, {what}"] += masters * shards(network.parameters(), settings.shard_size)
        learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
        found["gradients"] += masters * shards(learning, settings.shard_size)
        found["optimiser (two moments)"] += 2 * masters * shards(learning, settings.shard_size)
    found["teacher"] += masters * sum(shards(network.parameters(), settings.shard_size) for network in frozen)
    found["centres"] += masters * sum(buffer.numel() for buffer in objective.buffers())
    return dict(found)


def shards(parameters: Iterable[nn.Parameter], shard_size: int) -> int:
    """Numbers that the first of ``shard_size`` processes holds: FSDP cuts a parameter's first dimension."""
    return sum(ceil(p.shape[0] / shard_size) * prod(p.shape[1:]) if p.ndim else 1 for p in parameters)


def parameter_counts(run: RunShape) -> dict[str, int]:
    """Parameters of each trained network, the mask token left out as publishers do."""
    with torch.device("meta"):
        objective = run.build()()
    return {
        name: sum(parameter.numel() for path, parameter in network.named_parameters() if path != "mask_token")
        for name, network in objective.trained().items()
    }
