"""The precision that losses are computed in."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where it is float64 already: no loss is computed in less than float32."""
    return x if x.dtype == torch.float64 else x.float()
