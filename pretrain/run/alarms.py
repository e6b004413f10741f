"""Collapse and stall in words: what a run's record shows, since which step, and what usually helps.

Every rule is a function of the record alone (`History`) and of a few facts of the configuration (`Facts`), so it can be
tried on made-up curves, and the same record always raises the same alarms. A rule speaks only of what still holds at
the end of the record, but for a jump of the loss. Limits are wide on purpose: an alarm that cries early is switched
off.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pretrain.run.history import Alarm, Facts, History, settled, since
from pretrain.run.slide_alarms import no_tissue_learned, slides_recognised

HELPS = "Usually helps: "  # what follows are ways out, apart by commas
LOOKS = 2  # looks in a row that a figure of features must be bad for
RECENT = 50  # records that make up "now" where a figure is logged at every step
# Times the usual gradient norm: where a small DINOv2 run came apart, it was 3.5 before the k-NN accuracy had fallen by
# a third.
GROWN = 3
FLAT = 500  # records over which a class-token loss at log K is no accident


def find_alarms(history: History, known: Facts) -> list[Alarm]:
    """The alarms that the record raises, in the order of the rules."""
    raised = [alarm for rule in ALARM_RULES if (alarm := rule(history, known)) is not None]
    return [replace(alarm, says=that_can_be_taken(alarm.says, known)) for alarm in raised]


def that_can_be_taken(says: str, known: Facts) -> str:
    """An alarm's line without the advice that names settings which the run hasn't got, or values that it has."""
    what, helps, ways = says.partition(f" {HELPS}")
    if not helps:
        return says
    each = re.split(r", (?![^(]*\))", ways.removesuffix("."))
    left = [way for way in each if all(map(known.has, re.findall(r"\b(?:objective|data|optim)\.\w+", way)))]
    left = [way for way in left if not any(known.is_set(*one) for one in re.findall(r"\b([\w.]+)=(\w+)", way))]
    return f"{what} {HELPS}{', '.join(left)}." if left else what


# Collapse -----------------------------------------------------------------------------------------------------------


def uniform_teacher(history: History, known: Facts) -> Alarm | None:
    """The teacher's targets are (nearly) uniform over prototypes."""
    for kind, most, begin, entropy in _kinds(history, known, "teacher_entropy", lambda nats, most: nats > 0.98 * most):
        return Alarm(
            "uniform teacher",
            begin,
            f"the teacher's {kind} targets say any prototype will do: entropy {entropy:.2f} of at most {most:.2f} nats"
            f" since step {begin}. Usually helps: a lower objective.teacher_temperature or a longer"
            " teacher_temperature_warmup, a lower optim.lr, objective.centring=sinkhorn.",
        )
    return None


def certain_teacher(history: History, known: Facts) -> Alarm | None:
    """The teacher's targets are (nearly) one prototype each."""
    for kind, _, begin, entropy in _kinds(history, known, "teacher_entropy", lambda nats, most: nats < 0.01 * most):
        return Alarm(
            "certain teacher",
            begin,
            f"the teacher's {kind} targets are one prototype each, without doubt: entropy {entropy:.3f} nats since step"
            f" {begin}. Usually helps: a higher objective.teacher_temperature (0.04 to 0.07), a lower optim.lr.",
        )
    return None


def same_target(history: History, known: Facts) -> Alarm | None:
    """All tiles get the same target, whatever it is: the sign that all collapses share."""
    for kind, _, begin, told in _kinds(history, known, "teacher_information", lambda nats, most: nats < 0.01 * most):
        return Alarm(
            "same target",
            begin,
            f"the teacher's {kind} targets are the same for every tile: they tell {told:.3f} nats about it since step"
            f" {begin}. The run has collapsed: go back to a checkpoint before it. Usually helps: a lower optim.lr, a"
            " longer optim.warmup_steps, objective.centring=sinkhorn.",
        )
    return None


def _kinds(
    history: History, known: Facts, figure: str, bad: Callable[[np.ndarray, float], np.ndarray]
) -> Iterator[tuple[str, float, int, float]]:
    """The kinds of target whose ``figure`` is bad up to the end, beside the most nats that there could be: that most,
    since which step, and the figure now."""
    for kind, count in known.prototypes.items():
        steps, values = settled(history, f"{figure}/{kind}", known)
        most = math.log(count)
        if (begin := since(steps, bad(values, most), LOOKS)) is not None:
            yield kind, most, begin, values[-1]


def few_prototypes(history: History, known: Facts) -> Alarm | None:
    """Few of the prototypes that could be used are."""
    for kind in known.prototypes:
        steps, values = settled(history, f"prototype_use/{kind}", known)
        if not len(values):
            continue
        limit = max(0.02, 0.2 * values.max())
        if (begin := since(steps, values < limit, LOOKS)) is not None:
            return Alarm(
                "few prototypes",
                begin,
                f"few {kind} prototypes are used: {values[-1]:.1%} of those that could be, since step {begin} (most so"
                f" far: {values.max():.1%}). Usually helps: objective.centring=sinkhorn, a higher"
                " objective.teacher_temperature, a lower optim.lr.",
            )
    return None


def low_rank(history: History, known: Facts) -> Alarm | None:
    """Features use a direction or two, or far fewer than they did."""
    for name, what in (
        ("rankme", "features of the step's tiles"),
        ("probe_rankme", "features of the probe's images"),
        ("effective_rank", "slide embeddings"),
    ):
        steps, values = settled(history, name, known)
        if not len(values):
            continue
        limit = max(1.5, values.max() / 3)
        if (begin := since(steps, values < limit, LOOKS)) is not None:
            return Alarm(
                "low rank",
                begin,
                f"the {what} use few directions: RankMe {values[-1]:.1f} since step {begin} (highest so far:"
                f" {values.max():.1f}; 1 is collapse). Usually helps: a lower optim.lr, and for tiles a spread"
                " regulariser (objective.spread=koleo or kde, never kde_as_published).",
            )
    return None


def parallel_features(history: History, known: Facts) -> Alarm | None:
    """All features point the same way."""
    steps, values = settled(history, "feature_cosine", known)
    if (begin := since(steps, values > 0.98, LOOKS)) is None:
        return None
    return Alarm(
        "parallel features",
        begin,
        f"the features of different tiles are nearly one: mean cosine {values[-1]:.4f} since step {begin}. Usually"
        " helps: a spread regulariser (objective.spread=koleo or kde, never kde_as_published alone), a lower"
        " optim.lr.",
    )


# Nothing is learned, or the loss runs away ----------------------------------------------------------------------------


def flat_loss(history: History, known: Facts) -> Alarm | None:
    """A loss stays at the logarithm of the number of prototypes: the student's guess is no better than any."""
    for kind, names in known.chance_losses.items():
        count, (steps, *others) = known.prototypes.get(kind), (history.of(name)[0] for name in names)
        if not count or not all(np.array_equal(steps, other) for other in others):
            continue
        together = np.sum([history.of(name)[1] for name in names], axis=0)
        steps, off = steps[steps >= known.settled], np.abs(together - math.log(count))[steps >= known.settled]
        if (begin := since(steps, off < 0.005 * math.log(count), FLAT)) is not None:
            return Alarm(
                "flat loss",
                begin,
                f"{' + '.join(names)} has stayed at log K = {math.log(count):.2f} since step {begin}: the student learns"
                " nothing from the teacher. Usually helps: a lower objective.teacher_temperature, a higher optim.lr (or"
                " the end of its warm-up), a look at the crops in samples/.",
            )
    return None


def jump(history: History, known: Facts) -> Alarm | None:
    """The loss leaves the band that it was in, for some records in a row."""
    steps, values = history.of("loss")
    window, lasting = 200, 5
    if len(values) < window + lasting:
        return None
    highest = sliding_window_view(values, window).max(axis=1)[:-lasting]  # [i]: of values[i : i + window]
    after = sliding_window_view(values, lasting).min(axis=1)[window:]
    for begin in np.flatnonzero((after > highest) & (steps[: len(after)] >= known.settled)).tolist():
        end = begin + window
        before, now = values[begin:end], values[end : end + lasting]
        low, middle, high = np.quantile(before, [0.05, 0.5, 0.95])
        if now.min() > middle + 4 * max(high - low, 0.01 * abs(middle)):
            return Alarm(
                "jump of the loss",
                int(steps[end]),
                f"the loss jumped from {middle:.3f} to {now.min():.3f} or more at step {steps[end]} and stayed there"
                f" for {lasting} records. If it doesn't come back: go back to a checkpoint before it. Usually helps: a"
                " lower optim.lr or optim.clip, a longer warm-up.",
            )
    return None


def growing_gradient(history: History, known: Facts) -> Alarm | None:
    """Gradient norms are several times what they were."""
    steps, values = settled(history, "grad_norm", known)
    if len(values) < 4 * RECENT:
        return None
    usual, now = float(np.median(values[:-RECENT])), values[-RECENT:]
    if usual <= 0 or np.median(now) < GROWN * usual:
        return None
    begin = int(steps[-RECENT:][np.argmax(now > GROWN * usual)])
    return Alarm(
        "growing gradient",
        begin,
        f"the gradient norm is {np.median(now):.3g} since about step {begin}, where {usual:.3g} was usual before. "
        "Usually helps: a lower optim.lr, a lower optim.clip.",
    )


# The machine ---------------------------------------------------------------------------------------------------------


def slow(history: History, known: Facts) -> Alarm | None:
    """Steps take more than twice as long as they did."""
    for unit in ("tiles", "slides"):
        steps, values = history.of(f"{unit}_per_second")
        if len(values) < 4 * RECENT:
            continue
        usual, now = float(np.median(values[:-RECENT])), values[-RECENT:]
        if np.median(now) < 0.5 * usual:
            begin = int(steps[-RECENT:][np.argmax(now < 0.5 * usual)])
            return Alarm(
                "slow",
                begin,
                f"{np.median(now):.3g} {unit}/s since about step {begin}, where {usual:.3g} were usual. Look at"
                " data_wait (the storage) and at what else runs on the machine; a GPU that is hot or shared slows all"
                " the others down.",
            )
    return None


def waiting_for_data(history: History, known: Facts) -> Alarm | None:
    """Steps wait for data more than they compute."""
    steps, values = history.of("data_wait")
    now = values[-RECENT:]
    if len(values) <= RECENT or np.median(now) <= 0.5:
        return None
    begin = int(steps[-RECENT:][np.argmax(now > 0.5)])
    return Alarm(
        "waiting for data",
        begin,
        f"{np.median(now):.0%} of a step goes in waiting for data, since step {begin} or earlier. Usually helps: more"
        " data.threads or processor cores for each process, faster storage; 'pretrain doctor data.shards=…' measures"
        " both.",
    )


Rule = Callable[[History, Facts], Alarm | None]
ALARM_RULES: tuple[Rule, ...] = (
    same_target,
    uniform_teacher,
    certain_teacher,
    few_prototypes,
    low_rank,
    parallel_features,
    slides_recognised,
    no_tissue_learned,
    flat_loss,
    jump,
    growing_gradient,
    slow,
    waiting_for_data,
)
