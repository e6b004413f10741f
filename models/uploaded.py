"""Numbers that the host knows, on their way to the device."""

import torch
from torch import Tensor


def uploaded(numbers: Tensor, device: torch.device) -> Tensor:
    """``numbers`` of the CPU on ``device``; to a GPU from page-locked memory, so that nobody waits for it."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
