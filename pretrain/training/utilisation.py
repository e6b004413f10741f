"""What a step uses of its machine: the most memory, and operations as a share of the devices' peak."""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pretrain.run.progress import say
from pretrain.settings.hardware import peak_of
from pretrain.training.trainer_settings import TrainerSettings


@dataclass(frozen=True)
class Utilisation:
    """``peak``: operations a second that all devices together can do; ``of_a_tile``: those that a tile costs."""

    peak: float
    of_a_tile: float

    def share(self, tiles: int, seconds: float) -> float:
        """The share of the peak that ``tiles`` of all processes took in so many seconds."""
        return self.of_a_tile * tiles / seconds / self.peak


def find_utilisation(
    settings: TrainerSettings, device: torch.device, processes: int, count_operations: Callable[[bool], float], who: str
) -> Utilisation | None:
    """What ``flop_utilisation`` is computed from, where a device's peak is known.

    ``count_operations`` counts those of a tile, by whether attention is fused. Where it can't, that is said, unless
    ``who`` is empty, and there is none.
    """
    peak = settings.peak_tflops * 1e12 if settings.peak_tflops else peak_of(device, settings.precision)
    if peak is None:
        return None
    try:
        return Utilisation(peak * processes, count_operations(device.type == "cuda"))
    except Exception as error:  # a plug-in may do what tensors without numbers can't: no reason not to train
        if who:
            say(f"{who}: no flop_utilisation, since a step's operations can't be counted ({error!r})")
        return None


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: on its GPU, as torch allocated them, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
