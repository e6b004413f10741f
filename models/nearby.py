"""What lies near a masked tile: means of its slide's visible tiles, weighted by distance, at several learned reaches.

Tissue is much like the tissue beside it, so most of what can be predicted of a masked tile is in its nearest visible
ones. A small decoder that has to find that out by attention over position codes needs tens of thousands of steps; here
it is given, and the layers learn what neighbours can't explain. One group of channels is one Gaussian weighting,

    near_g(p) = Σ_v softmax_v(-|p - v|² / (2 reach_g²)) x_v,g

and the layers after it may take differences of groups, so weights need not stay positive (as in kriging, Matheron
1963).
"""

from collections.abc import Sequence
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.operations import Operations, attention_products

SHORTEST, LONGEST = 0.5, 4.0  # reaches that are begun with, in cells


class Nearby(nn.Module):
    """``groups`` of channels, each with a reach of its own. Costs one full attention between masked and visible
    tiles."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.log_reach = nn.Parameter(torch.empty(groups))
        if not self.log_reach.is_meta:
            first_reaches(self.log_reach.data)

    def forward(
        self, x: Tensor, at: Tensor, wanted: Tensor, lengths: Sequence[int], wanted_lengths: Sequence[int]
    ) -> Tensor:
        """(V, width) visible tiles, at cells (V, 2), and wanted cells (M, 2) → (M, width); ``lengths`` are the tiles
        per slide of either.

        Computed in float32 or better: as ``(p·v - |v|²/2) / reach²``, which softmax can't tell from ``-|p - v|²/(2
        reach²)``.
        """
        precise = torch.promote_types(x.dtype, torch.float32)
        reach = self.log_reach.to(precise).exp()[:, None, None]  # (groups, 1, 1)
        found = []
        slides = zip(
            *(part.split(list(n)) for part, n in ((x, lengths), (at, lengths), (wanted, wanted_lengths))), strict=True
        )
        for values, places, asked in slides:
            values = values.to(precise).unflatten(1, (len(reach), -1)).transpose(0, 1)  # (groups, v, width / groups)
            centre = places.to(precise).mean(dim=0)  # small numbers keep their differences
            places, asked = (places - centre) / reach, (asked - centre) / reach  # (groups, v or m, 2)
            keys = torch.cat([places, places.square().sum(dim=2, keepdim=True) / -2], dim=2)
            queries = torch.cat([asked, torch.ones_like(asked[..., :1])], dim=2)
            room = max(values.shape[2], 3)  # memory-efficient kernels want one width throughout
            q, k, v = (F.pad(part, (0, room - part.shape[2]))[None] for part in (queries, keys, values))
            with torch.autocast(x.device.type, enabled=False):
                near = F.scaled_dot_product_attention(q, k, v, scale=1.0)[0, ..., : values.shape[2]]
            found.append(near.transpose(0, 1).flatten(1))
        return torch.cat(found).to(x.dtype)

    def operations(self, width: int, lengths: Sequence[int], visible_lengths: Sequence[int]) -> Operations:
        """Of a pass over slides of ``lengths`` tiles, ``visible_lengths`` of them visible."""
        pairs = sum(seen * (n - seen) for n, seen in zip(lengths, visible_lengths, strict=True))
        return attention_products(pairs, width)


def first_reaches(log_reach: Tensor) -> None:
    """Fill (groups,) with the logarithms of reaches in even steps of it, from `SHORTEST` to `LONGEST`."""
    log_reach.copy_(torch.linspace(log(SHORTEST), log(LONGEST), len(log_reach), dtype=log_reach.dtype))
