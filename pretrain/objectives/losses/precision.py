"""The precision that losses are computed in."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where numbers are that already: no loss is computed in less than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in `wide` numbers."""
    return x.to(wide(x.dtype))
