"""Packed slides: tokens of several slides, or of crops of them, one behind the other in a single ``(T, …)`` tensor.

Whatever is done to each of them is done at once to a run of equal lengths. Crops of a grid are many and alike, and one by
one a GPU would wait for its host.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from models.uploaded import repeated


def in_runs(x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """``(T, …)`` → ``(slides, tokens, …)`` for every run of slides of one length, without a copy."""
    runs = [(len(list(same)), length) for length, same in groupby(lengths)]
    parts = x.split([count * length for count, length in runs])
    return [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]


def prepend(token: Tensor, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Put the tokens ``token`` (n, …) before each slide of the packed ``x`` (T, …) → (T + n B, …)."""
    token = token.to(x.dtype)
    return torch.cat(
        [torch.cat([token.expand(len(run), *token.shape), run], dim=1).flatten(0, 1) for run in in_runs(x, lengths)]
    )


def summarise(
    x: Tensor, lengths: Sequence[int], special: int = 1, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed slides with CLS in front, the first of their ``special`` tokens → their tiles (T, width), CLS tokens (B,
    width) and mean tiles (B, width); means are over the tiles that are ``valid`` (T,), where that is said."""
    runs = in_runs(x, lengths)
    tiles = [run[:, special:] for run in runs]
    if valid is None:
        means = [some.mean(dim=1) for some in tiles]
    else:
        precise = torch.promote_types(x.dtype, torch.float32)
        there = in_runs(valid, [n - special for n in lengths])
        means = [  # a count needn't fit a low precision
            ((of.to(x.dtype).unsqueeze(1) @ some).squeeze(1).to(precise) / of.sum(1, keepdim=True)).to(x.dtype)
            for some, of in zip(tiles, there, strict=True)
        ]
    return torch.cat([some.flatten(0, 1) for some in tiles]), torch.cat([run[:, 0] for run in runs]), torch.cat(means)


def numbers_of_slides(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(T,) int64, the number of each token's slide."""
    return repeated(torch.arange(len(lengths)), lengths, device)


def of_each_token(values: Sequence[float], lengths: Sequence[int], like: Tensor) -> Tensor:
    """(T,) for each token the value of its slide, on the device and in the precision of ``like``."""
    return repeated(torch.tensor(values, dtype=like.dtype), lengths, like.device)
