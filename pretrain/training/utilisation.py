"""What a step uses of its machine: the most memory, and operations as a share of the device's peak."""

import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch

from pretrain.objectives.contract import operations_of
from pretrain.objectives.interface import Objective
from pretrain.settings.hardware import peak_of
from pretrain.training.trainer_settings import TrainerSettings


def device_peak(settings: TrainerSettings, device: torch.device) -> float | None:
    """Floating-point operations a second that a process's device can do; None where nobody says."""
    return settings.peak_tflops * 1e12 if settings.peak_tflops else peak_of(device, settings.precision)


def silent_about_operations(objective: Objective) -> list[str]:
    """The classes of an objective, not sharded yet, and of its networks that don't say their operations themselves.

    What a class inherits is of what its parent computes, and it may compute more. torch's own layers say nothing:
    the objective counts them by their matrices.
    """
    networks = [*objective.trained().values(), *objective.frozen().values()]
    kinds = [type(objective), *(kind for kind in map(type, networks) if not kind.__module__.startswith("torch.nn."))]
    return sorted({kind.__name__ for kind in kinds if "operations" not in vars(kind)})


def operations_of_step(objective: Objective, parts: Sequence[Any], checkpointing: str) -> float:
    """Floating-point operations of a step on these micro-batches; ``checkpointing``: see
    `pretrain.training.trainer_settings.CHECKPOINTING`."""
    found = operations_of(objective, parts)
    return (
        found.forward + found.backward + {"none": 0.0, "full": found.full, "selective": found.selective}[checkpointing]
    )


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: on its GPU, as torch allocated them, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
