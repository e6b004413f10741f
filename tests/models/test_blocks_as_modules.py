"""What somebody puts into a block's place is called: adapters, hooks, overrides, autocast; and finds the same numbers."""

import pytest
import torch
from torch import Tensor, nn

from models.vit import Block, VisionTransformer
from tests.models.drawn_depth import drawn_samples
from tests.models.test_vit import images, network

BYPASSED = ("attn", "attn.proj", "mlp", "mlp.fc2", "ls1", "ls2")


class Adapted(nn.Linear):
    """A map with a low-rank one beside it, as LoRA has them."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        self.load_state_dict(like.state_dict())
        self.down = nn.Linear(like.in_features, 2, bias=False)
        self.up = nn.Linear(2, like.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def blocks(vit: VisionTransformer) -> list[Block]:
    return [block for block in vit.blocks if isinstance(block, Block)]


@pytest.mark.parametrize("name", BYPASSED)
def test_a_hook_on_a_module_of_a_block_is_called_and_changes_no_number(name: str) -> None:
    vit = network()
    expected = vit.features(images(2, 32))[0]
    called: list[str] = []
    for block in blocks(vit):
        block.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
    torch.testing.assert_close(vit.features(images(2, 32))[0], expected, atol=1e-5, rtol=1e-5)
    assert len(called) == len(blocks(vit))


@pytest.mark.parametrize("name", ["attn.proj", "mlp.fc2"])
def test_an_adapter_in_a_map_s_place_acts_and_learns(name: str) -> None:
    vit = network()
    expected = vit.features(images(2, 32))[0]
    for block in blocks(vit):
        parent, _, leaf = name.partition(".")
        setattr(block.get_submodule(parent), leaf, Adapted(block.get_submodule(name)))
    found = vit.features(images(2, 32))[0]
    assert not torch.allclose(found, expected, atol=1e-3)
    found.square().sum().backward()
    assert all(block.get_submodule(name).down.weight.grad.abs().sum() > 0 for block in blocks(vit))


def test_an_override_and_a_map_without_bias_act() -> None:
    vit = network()
    expected = vit.features(images(2, 32))[0]
    for block in blocks(vit):
        block.mlp.forward = lambda x: 0 * x
    assert not torch.allclose(vit.features(images(2, 32))[0], expected, atol=1e-3)
    bare = network()
    for block in blocks(bare):
        block.attn.proj = nn.Linear(24, 24, bias=False)
    bare.features(images(2, 32))[0].sum().backward()
    assert all(block.attn.proj.weight.grad is not None for block in blocks(bare))


@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
def test_under_autocast_a_block_computes_and_learns(feed_forward: str) -> None:
    vit = network(feed_forward=feed_forward)
    expected = vit.features(images(2, 32))[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = vit.features(images(2, 32))[0]
    found.float().square().sum().backward()
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    assert all(parameter.grad is not None for parameter in blocks(vit)[0].parameters())


def called_block(block: Block, x: Tensor, shapes: list[tuple[int, int]], kept: object) -> list[Tensor]:
    x = x.clone().requires_grad_()
    found = block(x, shapes, kept)
    found.sin().sum().backward()
    grads = [x.grad, *(parameter.grad.clone() for parameter in block.parameters())]
    block.zero_grad()
    return [found, *grads]


@pytest.mark.parametrize("kept", [False, True])
def test_module_by_module_a_block_has_the_results_and_gradients_of_its_branches_ends(kept: bool) -> None:
    block, shapes = blocks(network())[0].double(), [(4, 17), (4, 5)]
    views = [(1, 17), (1, 5)]
    drawn = drawn_samples(views, 4, group=4, rate=0.5, depth=1, seed=0, step=0, first=0)
    depth = drawn[0] if kept and drawn else None
    x = torch.randn(88, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ends = called_block(block, x, shapes, depth)
    handle = block.mlp.register_forward_hook(lambda *_: None)
    modules = called_block(block, x, shapes, depth)
    handle.remove()
    for one, other in zip(ends, modules, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
