"""Rollout by vectors is the product of explicit attention matrices."""

import pytest
import torch
from torch import Tensor

from models.attention_rollout import rollout
from models.initialise import initialise
from models.longnet import LongNet
from models.slide_vit import SlideViT
from models.token_order import along_hilbert

SIZES = {
    "input_width": 6,
    "width": 16,
    "depth": 3,
    "heads": 4,
    "feed_forward_width": 24,
    "dropout": 0.0,
    "drop_path": 0.0,
}


def slide(n: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n)
    return torch.randn(n, 6, generator=draw) * 3, torch.stack([torch.arange(n) % 7, torch.arange(n) // 7], 1)


def rolled_out(matrices: list[Tensor], special: int, of_class: bool) -> Tensor:
    n = len(matrices[0])
    product = torch.eye(n)
    for matrix in matrices:
        product = 0.5 * (torch.eye(n) + matrix) @ product
    return (product[0] if of_class else product[special:].mean(0))[special:]


def inputs_of_layers(network, units, tokens, cells) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [unit.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for unit in units]
    network(tokens, cells, [len(tokens)])
    for hook in hooks:
        hook.remove()
    return seen


def dilated(layer, x: Tensor, schedule) -> Tensor:
    """Mean over heads of softmax matrices in which a key counts as often as branches show it to the query."""
    q, k, _ = layer.self_attn.project(layer.self_attn_layer_norm(x))
    n, heads, width = q.shape
    matrices = []
    for head in range(heads):
        times = torch.zeros(n, n)
        for w, r in schedule:
            group = head // -(-heads // r)
            segment, offset = torch.arange(n) // w, torch.arange(n) % w % r
            times += (segment[:, None] == segment) & (offset == group) & (offset == group)[:, None]
        weights = times * (q[:, head] @ k[:, head].T / width**0.5).exp()
        matrices.append(weights / weights.sum(1, keepdim=True).clamp(min=1e-30))
    return torch.stack(matrices).mean(0)


@torch.no_grad()
@pytest.mark.parametrize(("of_class", "order"), [(True, "rows"), (False, "rows"), (False, "hilbert")])
def test_of_dilated_attention_it_equals_the_dense_product_slide_by_slide(of_class, order):
    network = LongNet(**SIZES, order=order, segment_lengths=[8, 24], dilated_ratios=[1, 2], compatible=False).eval()
    initialise(network, 0)
    many = [slide(n) for n in (30, 1, 12)]
    tokens, cells = (torch.cat(parts) for parts in zip(*many, strict=True))
    found = rollout(network, tokens, cells, [30, 1, 12], of_class).split([30, 1, 12])
    for got, (x, at) in zip(found, many, strict=True):
        states = inputs_of_layers(network, network.encoder.layers, x, at)
        layers = zip(network.encoder.layers, states, strict=True)
        matrices = [dilated(layer, state, [(8, 1), (24, 2)]) for layer, state in layers]
        if order == "hilbert":  # as the layers see them
            got = got[along_hilbert(at, [len(x) + 1])[1:] - 1]
        torch.testing.assert_close(got, rolled_out(matrices, 1, of_class), atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reach", [None, [3.0]])
def test_of_attention_by_distance_it_equals_the_dense_product(reach):
    network = SlideViT(**SIZES, registers=2, slopes="learned", reach=reach).eval()
    initialise(network, 0)
    x, at = slide(30)
    found = rollout(network, x, at, [30], of_class=False)
    places = torch.cat([torch.zeros(3, 2), at.float()])
    distances = torch.cdist(places, places)
    distances[:3], distances[:, :3] = 0, 0
    matrices = []
    for block, state in zip(
        network.encoder.blocks, inputs_of_layers(network, network.encoder.blocks, x, at), strict=True
    ):
        q, k, _ = block.qkv(block.norm1(state)).unflatten(1, (3, 4, -1)).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 2 - block.slopes(state)[:, None, None] * distances
        if reach:
            scores = scores.masked_fill(distances > reach[0], -torch.inf)
        matrices.append(scores.softmax(-1).mean(0))
    torch.testing.assert_close(found, rolled_out(matrices, 3, False), atol=1e-6, rtol=1e-5)
