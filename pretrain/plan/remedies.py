"""What to change where a run doesn't fit: settings of its own, tried one after the other until the memory suffices."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from data.fault import Fault
from pretrain.plan.estimate import Estimate, Settings


@dataclass
class Remedy:
    """Words for the command line, and what they lead to."""

    words: str
    peak: int
    fits: bool


def remedies(
    settings: Settings,
    nodes: int,
    of: Callable[[Settings], Estimate],
    fits: Callable[[Estimate], bool],
    gpu: bool,
    slides: bool = False,
) -> Iterator[Remedy]:
    """Changes that keep the step what it is (the global batch stays), the cheapest first; the last one fits, unless
    none does.

    ``slides``: whether it is a run of the slide stage, whose processes can share a slide.
    """
    words: list[str] = []
    now = settings
    if gpu and settings.precision == "float32":
        now, words = replace(now, precision="bf16"), ["trainer.precision=bf16"]
        remedy = _tried(words, now, of, fits)
        yield remedy
        if remedy.fits:
            return
    if settings.shard_size < settings.processes:
        now = replace(now, shard_size=settings.processes)
        words = [*words, "trainer.shard_size=null"]
        remedy = _tried(words, now, of, fits)
        yield remedy
        if remedy.fits:
            return
    for kind in ("selective", "full"):
        if settings.checkpointing == "none" or (settings.checkpointing, kind) == ("selective", "full"):
            deeper = replace(now, checkpointing=kind)
            remedy = _tried([*words, f"trainer.activation_checkpointing={kind}"], deeper, of, fits)
            yield remedy
            if remedy.fits:
                return
            if kind == "full":
                now, words = deeper, [*words, "trainer.activation_checkpointing=full"]
    for times in (2, 4, 8):
        smaller = replace(now, accumulate=settings.accumulate * times)
        try:
            remedy = _tried([*words, f"trainer.accumulate={smaller.accumulate}"], smaller, of, fits)
        except Fault:  # the batch has no such parts
            break
        yield remedy
        if remedy.fits:
            return
    for times in (2, 4, 8) if slides else ():
        # With as many micro-batches, each process has its part of one that is as small as before.
        together = settings.together * times
        shared = replace(now, together=together, accumulate=settings.accumulate * times)
        try:
            remedy = _tried(
                [*words, f"data.processes_per_slide={together} trainer.accumulate={shared.accumulate}"],
                shared,
                of,
                fits,
            )
        except Fault:  # which don't divide the processes or the heads
            break
        yield remedy
        if remedy.fits:
            return
    for times in (2, 4, 8):
        more = settings.processes * times
        wider = replace(now, processes=more, shard_size=more)
        try:
            remedy = _tried([*words, f"launch.nodes={nodes * times}"], wider, of, fits)
        except Fault:  # nor for so many processes
            break
        yield remedy
        if remedy.fits:
            return


def _tried(
    words: list[str], settings: Settings, of: Callable[[Settings], Estimate], fits: Callable[[Estimate], bool]
) -> Remedy:
    found = of(settings)
    return Remedy(" ".join(words), found.peak, fits(found))
