"""Crops of several sizes in one sequence, stochastic depth on: the numbers of one pass for each size, forward and
backward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from models.initialise import initialise
from models.vit import KeptSamples, Tokens, VisionTransformer
from tests.models.drawn_depth import drawn_samples

TILES, GROUP, DEPTH = 4, 2, 3
DINOV3 = {"position_embedding": "rope", "qkv_bias": "no_key", "norm_epsilon": 1e-5, "own_cls_norm": True}
TOLERANCE = 1e-6  # of the tensor's largest value, in float32


KINDS = [("mlp", 0, {}), ("swiglu", 4, {}), ("swiglu", 4, DINOV3)]


def network(feed_forward: str, registers: int, **settings: Any) -> VisionTransformer:
    vit = VisionTransformer(
        image_size=32,
        patch_size=8,
        width=24,
        depth=DEPTH,
        heads=3,
        feed_forward=feed_forward,
        feed_forward_width=40,
        registers=registers,
        layer_scale=0.5,
        **settings,
    )
    initialise(vit, 0)
    with torch.no_grad():
        for number, parameter in enumerate(vit.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return vit


def of_one_size(
    kept: list[tuple[KeptSamples, KeptSamples]], which: int, start: int, length: int
) -> list[tuple[KeptSamples, KeptSamples]]:
    """The part of a packed plan that concerns one crop size, for a sequence of its own."""

    def part(branch: KeptSamples) -> KeptSamples:
        own = (branch.rows >= start) & (branch.rows < start + length)
        assert own.sum() == branch.shapes[which][0] * branch.shapes[which][1]
        rows = branch.rows[own] - start
        return KeptSamples(rows, [branch.shapes[which]], [branch.scales[which]])

    return [(part(first), part(second)) for first, second in kept]


def loss(tokens: Tokens, which: int) -> Tensor:
    return sum((part * (1 + which)).sin().sum() for part in tokens)  # type: ignore[return-value]


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize(("feed_forward", "registers", "settings"), KINDS)
def test_packed_equals_unpacked_with_stochastic_depth_and_masks(
    feed_forward: str, registers: int, settings: dict[str, Any], rate: float
) -> None:
    vit, scales = network(feed_forward, registers, **settings), [0.7, 1.6]
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randn(2 * TILES, 3, 32, 32, generator=generator),
        torch.randn(3 * TILES, 3, 16, 16, generator=generator),
    ]
    masks = [torch.rand(2 * TILES, 16, generator=generator) < 0.3, None]
    tokens = [vit.tokens_per_crop(32), vit.tokens_per_crop(16)]
    kept = drawn_samples(
        list(zip((2, 3), tokens, strict=True)), TILES, group=GROUP, rate=rate, depth=DEPTH, seed=0, step=3, first=0
    )
    assert (kept is None) == (rate == 0)

    packed = vit(crops, masks, kept, scales=scales)
    sum(loss(part, i) for i, part in enumerate(packed)).backward()
    packed_gradients = {name: parameter.grad.clone() for name, parameter in vit.named_parameters()}
    vit.zero_grad()
    lengths = [len(images) * count for images, count in zip(crops, tokens, strict=True)]
    for i, found in enumerate(packed):
        own = None if kept is None else of_one_size(kept, i, sum(lengths[:i]), lengths[i])
        (alone,) = vit([crops[i]], [masks[i]], own, scales=scales[i : i + 1])
        loss(alone, i).backward()  # gradients add up over the sizes
        for one, other in zip(found, alone, strict=True):
            if one.numel():
                assert (one - other).abs().max() <= TOLERANCE * other.abs().max()
    for name, parameter in vit.named_parameters():
        assert (packed_gradients[name] - parameter.grad).abs().max() <= TOLERANCE * parameter.grad.abs().max(), name


@pytest.mark.parametrize(("rate", "settings"), [(0.0, {}), (0.4, {}), (0.4, DINOV3)])
def test_a_block_compiles_to_one_graph_and_the_last_one_to_another(rate: float, settings: dict[str, Any]) -> None:
    vit = network("mlp", 0, **settings)
    crops, masks = [torch.randn(2 * TILES, 3, 32, 32)], [torch.rand(2 * TILES, 16) < 0.3]
    kept = drawn_samples(
        [(2, vit.tokens_per_crop(32))], TILES, group=GROUP, rate=rate, depth=DEPTH, seed=0, step=3, first=0
    )
    (expected,) = vit(crops, masks, kept, wanted=[masks[0].flatten().nonzero()[:, 0]])
    graphs = CompileCounter()
    for block in vit.blocks:
        block.forward = torch.compile(block.forward, backend=graphs)
    (found,) = vit(crops, masks, kept, wanted=[masks[0].flatten().nonzero()[:, 0]])
    torch.testing.assert_close(found, expected)
    if settings:  # other angles are the same graph
        vit(crops, masks, kept, wanted=[masks[0].flatten().nonzero()[:, 0]], scales=[1.3])
    assert graphs.frame_count == 2
