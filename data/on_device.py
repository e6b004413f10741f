"""Arrays on their way to a device."""

import numpy as np
import torch
from torch import Tensor


def on_device(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """``array`` on ``device``; to a GPU from page-locked memory, so that nobody waits for what the GPU does before."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # What has gaps would be laid out anew, in memory that isn't locked, before it is copied.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
