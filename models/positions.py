"""Fixed positions: MAE's two-dimensional sines and cosines (He et al. 2022), which Prov-GigaPath's slide encoder took
over."""

import torch
from torch import Tensor


def check_sines(width: int) -> None:
    """Raise ValueError for a width that sines and cosines of two coordinates don't fill."""
    if width % 4:
        raise ValueError(f"width {width} must be a multiple of 4, for sines and cosines of two coordinates")


def position_embedding(cells: Tensor, width: int, extent: int | None = None) -> Tensor:
    """(T, 2) integer cells (x, y) → (T, width) float32: ``[sin(yω), cos(yω), sin(xω), cos(xω)]``, ``ω_i = 10000^(-4i /
    width)``.

    These are the rows of the released model's table of 1000 × 1000 cells (MAE's 2-d sine-cosine embedding), computed
    for the columns and rows that occur instead of stored for all. Cells beyond 1000 keep their own values; the table
    wraps there. ``extent``: a number that all cells are below, and none below 0, where that is known; else they are
    asked, which on a GPU makes everybody wait. Raises ValueError for a negative cell that is found so.
    """
    if len(cells) == 0:
        return torch.zeros(0, width, device=cells.device)
    if extent is None:
        least, most = (int(end) for end in cells.aminmax())
        if least < 0:
            raise ValueError(f"cells of a tile grid start at 0; found {least}")
        extent = most + 1
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=cells.device) / quarter)
    angle = torch.arange(extent, dtype=torch.float64, device=cells.device)[:, None] * omega
    table = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (cells along one axis, width / 2)
    return torch.cat([table[cells[:, 1]], table[cells[:, 0]]], dim=1)


def grid_embedding(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """The fixed positions of an image's patches, row by row: ``(rows * columns, width)``; MAE's first half is the
    column's."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    places = torch.stack([row.flatten(), column.flatten()], dim=1)
    return position_embedding(places, width, extent=max(rows, columns))
