"""Two alarms of features that recognise slides rather than tissue: tissue is told worse than it was, and tissue is told
no better than by random weights.

Both are tests, since k-NN accuracies scatter from checkpoint to checkpoint. Whoever takes the best of sixteen that
scatter evenly finds a fall behind it, so a fall is judged against the falls that chance makes, at every checkpoint
anew, and errors over few slides are themselves hardly known. Of 400 flat runs of 16 checkpoints with independent noise
fewer than 5 % raise either alarm, and as few of 2, 4 and 10 slides whose noise is new at each checkpoint (the tests
count them).
"""

import math

import numpy as np

from pretrain.run.history import Alarm, Facts, History, settled, since

FEWEST_CHECKPOINTS = 4
LEAST_FALL = 0.02  # of the accuracy, or it is nothing to speak of
# Standard errors by which the mean of two checkpoints in a row must lie under the highest such mean, times √(log n) of n
# checkpoints: the largest difference of many grows like that.
FALL_IN_ERRORS = 2.3
FALL_BY_RANKS = 0.03  # over n checkpoints: the chance of falls as steady as those since the best one
RISE = 0.05  # of the accuracy for slides, or half of what there is left to rise
RISE_OVER_RANDOM = 0.1
LATEST = 4  # looks that say how well slides are told now, beside random weights


def slides_recognised(history: History, known: Facts) -> Alarm | None:
    """Tissue is told worse than it was, while slides are told better than then, or well and no worse."""
    steps, tissue = settled(history, "probe_knn", known)
    looks, slides = settled(history, "slide_knn", known)
    if len(tissue) < FEWEST_CHECKPOINTS or not len(slides):
        return None
    errors = dict(zip(*(part.tolist() for part in history.of("probe_knn_se")), strict=True))
    error = math.sqrt(np.mean([errors.get(step, 0.0) ** 2 for step in steps.tolist()]))
    _, groups = history.of("probe_groups")
    fallen = fallen_by_errors(tissue, error, int(groups[-1]) if len(groups) else None) or fallen_steadily(tissue)
    if fallen is None:
        return None
    best, before, now = fallen
    begin = since(steps, tissue < (before + now) / 2, 1)
    earlier = slides[looks <= steps[best]][-2:]
    then, told = float((earlier if len(earlier) else slides[:1]).mean()), float(slides[-2:].mean())
    better = told >= then + min(RISE, (1 - then) / 2)
    well = told >= (1 + guessed(history)) / 2 and told > then - RISE
    if begin is None or not (better or well):
        return None
    return Alarm(
        "slides recognised",
        begin,
        f"features recognise slides rather than tissue: labelled tiles are told by k-NN with {now:.3f}, the mean of the"
        f" last two checkpoints, {before:.3f} about step {steps[best]}, while the slide of a tile is told with"
        f" {told:.3f}, {then:.3f} then. Usually helps: stronger data.colour (DINOv2's jitter,"
        " data.colour.stain_probability), more slides.",
    )


def fallen_by_errors(values: np.ndarray, error: float, groups: int | None) -> tuple[int, float, float] | None:
    """Where two values in a row were highest, their mean and that of the last two, if these lie further apart than
    chance has it: values (n,), n ≥ 4, each with the standard error ``error``, the root of the mean square of n that are
    over so many ``groups`` each (None: over tiles)."""
    pairs = (values[1:] + values[:-1]) / 2
    best = int(np.argmax(pairs[:-2]))
    limit = with_few_groups(FALL_IN_ERRORS * math.sqrt(math.log(len(values))), len(values), groups) * error
    if pairs[best] - pairs[-1] <= max(LEAST_FALL, limit):
        return None
    return best + 1, float(pairs[best]), float(pairs[-1])


def with_few_groups(errors: float, values: int, groups: int | None) -> float:
    """As unlikely a number of standard errors, where these are known from ``values`` × (``groups`` − 1) degrees of
    freedom alone: the quantile of t in place of the normal one."""
    from scipy.stats import norm, t

    if groups is None or groups < 2:
        return errors
    return float(t.isf(norm.sf(errors), values * (groups - 1)))


def fallen_steadily(values: np.ndarray) -> tuple[int, float, float] | None:
    """Where values (n,) were highest, that value and the mean of the last two, if they fell from it more steadily than
    chance has it, whatever their errors are (Mann 1945, Kendall 1975)."""
    best = int(np.argmax(values))
    before, now = float(values[best]), float(values[-2:].mean())
    if chance_of_falls(values[best:]) > FALL_BY_RANKS / len(values) or before - now <= LEAST_FALL:
        return None
    return best, before, now


def chance_of_falls(values: np.ndarray) -> float:
    """The chance that as many pairs of n values fall as do, less those that rise, where all orders are as likely: the
    normal approximation."""
    count = len(values)
    later_less_earlier = np.sign(values[None, :] - values[:, None])[np.triu_indices(count, 1)].sum()
    if later_less_earlier >= 0:
        return 1.0
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return 0.5 * math.erfc((-later_less_earlier - 1) / deviation / math.sqrt(2))


def no_tissue_learned(history: History, known: Facts) -> Alarm | None:
    """Tissue is told no better than by the first weights, as far as their errors tell, and slides are told better."""
    steps, tissue = settled(history, "probe_knn", known)
    _, slides = settled(history, "slide_knn", known)
    first, first_slides = (at_the_start(history, name) for name in ("probe_knn", "slide_knn"))
    if first is None or first_slides is None or min(len(tissue), len(slides)) < FEWEST_CHECKPOINTS:
        return None
    error = at_the_start(history, "probe_knn_se_tiles") or 0.0  # the tiles are the same ones: those of slides cancel
    late = tissue[len(tissue) // 2 :]
    told = float(slides[-LATEST:].mean())
    if late.mean() - first > 2 * error * math.sqrt(1 + 1 / len(late)):
        return None
    if told < first_slides + min(RISE_OVER_RANDOM, (1 - first_slides) / 2):
        return None
    return Alarm(
        "no tissue learned",
        int(steps[len(tissue) // 2]),
        f"features tell slides better than the first weights did, and tissue no better: labelled tiles are told by k-NN"
        f" with {late.mean():.3f} since step {steps[len(tissue) // 2]}, {first:.3f} ± {error:.3f} at step 0, and the"
        f" slide of a tile with {told:.3f}, {first_slides:.3f} at step 0. Usually helps: stronger data.colour (DINOv2's"
        " jitter, data.colour.stain_probability), more slides, another optim.lr.",
    )


def at_the_start(history: History, name: str) -> float | None:
    """A figure of the first weights, None where it isn't on record."""
    steps, values = history.of(name)
    return float(values[0]) if len(steps) and steps[0] == 0 else None


def guessed(history: History) -> float:
    """How well a guess tells the slide of a tile."""
    _, values = history.of("slide_chance")
    return float(values[-1]) if len(values) else 0.0
