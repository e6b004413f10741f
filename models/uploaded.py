"""Numbers that the host knows, on their way to the device, so that no GPU is waited for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def uploaded(numbers: Tensor, device: torch.device) -> Tensor:
    """``numbers`` of the CPU on ``device``; to a GPU from page-locked memory, without gaps: see `data.on_device`."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.contiguous().pin_memory().to(device, non_blocking=True)


def repeated(values: Tensor, counts: Sequence[int], device: torch.device) -> Tensor:
    """(n,) of the CPU, each value as often as its count says → (sum of counts,) on ``device``."""
    return uploaded(values, device).repeat_interleave(uploaded(torch.tensor(counts), device), output_size=sum(counts))
