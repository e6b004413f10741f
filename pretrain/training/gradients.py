"""Forward and backward of a step, written out: what the trainer takes, and what a plan rehearses."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pretrain.objectives.contract import checked_loss, prepared
from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.losses.precision import at_least_float32


def gradients(
    objective: Objective, parts: Sequence[tuple[Any, int]], moment: Moment, backward: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    """Forward and backward of a step's micro-batches, each with the number of its first sample in the global batch.

    The gradients are those of the mean loss over micro-batches and ranks; they are reduced over ranks once, in the last
    backward. Returns this rank's mean loss and figures, scalars of at least float32.
    """
    means: dict[str, Tensor] = {}
    given = prepared(objective, [part for part, _ in parts], moment)
    for i, (part, (_, first)) in enumerate(zip(given, parts, strict=True)):
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(i == len(parts) - 1, recurse=False)
        loss, figures = checked_loss(objective, part, replace(moment, first=first))
        backward(loss / len(parts))
        for name, value in {"loss": loss, **figures}.items():
            means[name] = means.get(name, 0.0) + at_least_float32(value.detach()) / len(parts)
    return means


def losses_of(
    objective: Objective, parts: Sequence[tuple[Any, int]], moment: Moment
) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Loss and figures of each of a step's micro-batches, by a forward alone."""
    given = prepared(objective, [part for part, _ in parts], moment)
    for part, (_, first) in zip(given, parts, strict=True):
        yield objective.loss(part, replace(moment, first=first))


def not_finite(values: Mapping[str, float]) -> list[str]:
    """The names of those that aren't finite."""
    return [name for name, value in values.items() if not math.isfinite(value)]
