"""Full against hybrid sharding: what each way to share the networks out takes of memory and of a step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pretrain.plan.estimate import Estimate, Settings
from pretrain.plan.step_time import StepTime

SLOW = 0.05  # of a step's computing: from here on, waiting for the network is said


@dataclass
class Sharding:
    """One ``trainer.shard_size``."""

    shard_size: int
    words: str  # of the command line
    peak: int  # bytes
    fits: bool
    seconds: float  # of a step's collectives
    exposed: float  # of these
    step_seconds: float


def compare_shardings(
    settings: Settings,
    per_node: int,
    of: Callable[[Settings], tuple[Estimate, StepTime]],
    fits: Callable[[Estimate], bool],
) -> Iterator[Sharding]:
    """The run's own sharding, and with more nodes than one that over all processes and that over those of a node.
    ``of``: memory and time under settings."""
    sizes = [settings.shard_size]
    if settings.processes > per_node:
        sizes += [settings.processes, per_node]
    for size in dict.fromkeys(sizes):
        found, step = of(replace(settings, shard_size=size))
        words = f"trainer.shard_size={'null' if size == settings.processes else size}"
        yield Sharding(size, words, found.peak, fits(found), step.communication, step.exposed, step.seconds)


def verdict(computing: float, found: list[Sharding]) -> str:
    """What of the network is to be said of a run whose own sharding is the first of ``found``, and that computes for so
    many seconds a step; nothing where it is fast enough."""
    own, *others = found
    if own.exposed <= SLOW * computing:
        return ""
    way_out = "more samples on each process, or a faster network, would do"
    fastest = min((one for one in others if one.fits), key=lambda one: one.step_seconds, default=own)
    if fastest.step_seconds < own.step_seconds:
        way_out = f"{fastest.words} would leave {fastest.exposed:.2g} s of it"
    return (
        f"The network is too slow: {own.exposed:.2g} s of communication are added to the {computing:.2g} s that a step"
        f" computes; {way_out}."
    )
