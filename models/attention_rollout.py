"""Attention rollout of a slide encoder (Abnar and Zuidema 2020), in memory that grows with the tiles alone.

    Â = ½ (I + mean over heads of A)  for each layer          rollout = Â_L ⋯ Â_1

Of the matrix one row is asked for, that of the class token or of the mean of the tiles, so a vector goes backwards
through the layers: ``r ← ½ (r + mean over heads of r A)``. And ``r A = Aᵀ r`` is the gradient of ``Σ_i r_i out_i`` by
the values, ``out = A v``: attention's own backward computes it, block by block, whatever its branches, biases and
reach.
"""

from collections.abc import Callable, Sequence
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from models.distance_attention import DistanceLayout, distance_attention
from models.longnet import Layer, in_pieces
from models.sequence_parallel import TokenShare
from models.slide_network import SlideNetwork
from models.slide_vit import DistanceBlock

Attend = Callable[[Tensor], Tensor]
"""Values (T, heads, head_width) → outputs of the same shape, by fixed queries and keys."""


def rollout(network: SlideNetwork, tokens: Tensor, cells: Tensor, lengths: Sequence[int], of_class: bool) -> Tensor:
    """(T,) how much of the class token (``of_class``), or of the mean of the tiles, comes from each tile; with what
    comes from special tokens a slide's are at most 1 in all. Arguments as `SlideNetwork.forward`.

    Each layer's input is kept. Raises ValueError for a network whose layers are neither LongNet's nor SlideViT's.
    """
    seen: list[tuple[nn.Module, tuple[Any, ...]]] = []
    hooks = [
        unit.register_forward_pre_hook(lambda unit, given: seen.append((unit, given)))
        for unit in network.encoder.units()
    ]
    try:
        with torch.no_grad():
            network(tokens, cells, lengths)
    finally:
        for hook in hooks:
            hook.remove()
    special = (len(seen[0][1][0]) - len(tokens)) // len(lengths)
    row = torch.cat([_first_row(n, special, of_class, tokens) for n in lengths])
    while seen:
        unit, given = seen.pop()
        with torch.no_grad():
            like, attend = attention_in(unit, *given)
        row = 0.5 * (row + _times_attention(row, like, attend))
    with_special = [n + special for n in lengths]
    if (order := network.encoder.order(cells, with_special)) is not None:
        row = torch.empty_like(row).index_copy(0, order, row)
    return torch.cat([some[special:] for some in row.split(with_special)])


@singledispatch
def attention_in(unit: nn.Module, *given: Any) -> tuple[Tensor, Attend]:
    """What a layer, ``given`` its inputs, attends with, and a tensor that values must be like."""
    raise ValueError(f"attention of a {type(unit).__name__} can't be rolled out")


@attention_in.register
def _of_longnet(unit: Layer, x: Tensor, share: TokenShare, *_: Any) -> tuple[Tensor, Attend]:
    q, k, v = in_pieces(lambda some: unit.self_attn.project(unit.self_attn_layer_norm(some)), x)
    return v, partial(_attend_dilated, unit, q, k, share)


def _attend_dilated(unit: Layer, q: Tensor, k: Tensor, share: TokenShare, v: Tensor) -> Tensor:
    return unit.self_attn.attend(q, k, v, share)


@attention_in.register
def _of_distances(unit: DistanceBlock, x: Tensor, layout: DistanceLayout, *_: Any) -> tuple[Tensor, Attend]:
    q, k, v = unit.qkv(unit.norm1(x)).unflatten(1, (3, unit.heads, -1)).unbind(1)
    return v, lambda values: distance_attention(q, k, values, layout, unit.slopes(x))


def _first_row(tiles: int, special: int, of_class: bool, like: Tensor) -> Tensor:
    row = like.new_zeros(special + tiles)
    if of_class:
        row[0] = 1
    else:
        row[special:] = 1 / tiles
    return row


def _times_attention(row: Tensor, like: Tensor, attend: Attend) -> Tensor:
    """``r A``, averaged over heads: one of a head's channels carries ``r`` as the gradient, the others nothing."""
    with torch.enable_grad():
        values = torch.zeros_like(like).requires_grad_()
        out = attend(values)
    upstream = torch.zeros_like(out)
    upstream[..., 0] = row[:, None]
    (found,) = torch.autograd.grad(out, values, upstream)
    return found[..., 0].mean(dim=1)
