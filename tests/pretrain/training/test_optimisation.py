"""Rates, groups and clipping."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.heads import PrototypeHead
from models.initialise import initialise
from models.vit import VisionTransformer
from pretrain.settings.composition import load
from pretrain.training.optimisation import Optim, clip, parameter_groups, scaled_lr, set_rates


def settings(**changes: object) -> Optim:
    """The command's own settings, but for these."""
    optim: Optim = load("tile", ["run=a", "data.shards=b"]).object().optim
    return replace(optim, **({"layer_decay": 0.5, "patch_embed_lr": 0.2} | changes))  # type: ignore[arg-type]


@pytest.fixture
def networks() -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {
        "encoder": VisionTransformer(image_size=16, patch_size=8, width=8, depth=2, heads=2, feed_forward_width=16),
        "dino_head": PrototypeHead(8, prototypes=12, bottleneck=4, hidden=8, layers=3),
    }
    for name, part in parts.items():
        initialise(part, 0, name)
    return parts


@pytest.mark.parametrize(("rule", "expected"), [("none", 2.0), ("sqrt_1024", 2.0 * math.sqrt(2)), ("linear_256", 16.0)])
def test_the_learning_rate_scales_with_the_global_batch_by_the_recipes_rule(rule: str, expected: float) -> None:
    assert scaled_lr(settings(lr=2.0, lr_scaling=rule), 2048) == pytest.approx(expected)


def test_every_trained_parameter_is_in_exactly_one_group(networks: dict[str, nn.Module]) -> None:
    groups = parameter_groups(networks, settings())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(
        id(parameter) for network in networks.values() for parameter in network.parameters()
    )


def rates(networks: dict[str, nn.Module], frozen: bool = False, **changes: object) -> dict[str, tuple[float, float]]:
    optimiser = torch.optim.AdamW(parameter_groups(networks, settings(**changes)))
    set_rates(optimiser, 1.0, 0.1, frozen)
    of = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    return {
        f"{network}.{name}": of[id(p)] for network, module in networks.items() for name, p in module.named_parameters()
    }


def test_layer_decay_is_the_encoders_and_weight_decay_spares_vectors(networks: dict[str, nn.Module]) -> None:
    found = rates(networks)
    assert found["encoder.cls_token"] == (0.125, 0.1)
    assert found["encoder.patch_embed.proj.weight"] == (0.025, 0.1)
    assert found["encoder.blocks.0.attn.qkv.weight"] == (0.25, 0.1)
    assert found["encoder.blocks.1.attn.qkv.bias"] == (0.5, 0.0)
    assert found["encoder.blocks.1.ls1.gamma"] == (0.5, 0.0)
    assert found["encoder.norm.weight"] == (1.0, 0.0)
    assert found["dino_head.mlp.0.weight"] == (1.0, 0.1)
    assert found["dino_head.last_layer.weight_g"] == (1.0, 0.1)  # trained with weight decay, as in DINOv2


def test_a_frozen_last_layer_stands_still_and_the_rest_moves(networks: dict[str, nn.Module]) -> None:
    found = rates(networks, frozen=True)
    still = {name for name, (lr, _) in found.items() if lr == 0.0}
    assert still == {"dino_head.last_layer.weight_g", "dino_head.last_layer.weight_v"}


def test_clipping_scales_to_the_limit_and_returns_the_norm_before() -> None:
    linear = nn.Linear(3, 1)
    linear.weight.grad, linear.bias.grad = torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([12.0])
    assert float(clip(linear.parameters(), 2.6)) == pytest.approx(13.0)
    torch.testing.assert_close(linear.weight.grad, torch.tensor([[0.6, 0.0, 0.8]]), atol=1e-6, rtol=1e-6)
    assert float(linear.bias.grad) == pytest.approx(2.4)


def test_each_tensor_can_be_clipped_by_itself_before_all_of_them_and_one_without_a_gradient_stays() -> None:
    linear, other = nn.Linear(3, 1), nn.Linear(3, 1)
    linear.weight.grad, linear.bias.grad = torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([12.0])
    other.bias.grad = torch.tensor([0.2])
    three = [*other.parameters(), *linear.parameters()]
    assert float(clip(three, 0.0, 0.3)) == pytest.approx(math.sqrt(169.04))
    torch.testing.assert_close(linear.weight.grad, torch.tensor([[0.18, 0.0, 0.24]]), atol=1e-6, rtol=1e-6)
    assert other.weight.grad is None and other.bias.grad.item() == pytest.approx(0.2)
    assert linear.bias.grad.item() == pytest.approx(0.3)
    clip(three, 0.1, 0.3)
    assert float(clip(three, 0.0)) == pytest.approx(0.1, rel=1e-4)
    nothing = nn.Linear(3, 1)
    assert float(clip(nothing.parameters(), 1.0, 0.3)) == 0.0


@pytest.mark.parametrize("limit", [0.0, 13.5])
def test_no_limit_or_a_wide_one_leaves_gradients_alone(limit: float) -> None:
    linear = nn.Linear(3, 1)
    linear.weight.grad, linear.bias.grad = torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([12.0])
    assert float(clip(linear.parameters(), limit)) == pytest.approx(13.0)
    assert linear.weight.grad.tolist() == [[3.0, 0.0, 4.0]]


def test_clipping_agrees_with_torchs() -> None:
    one, other = nn.Linear(20, 30), nn.Linear(20, 30)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(a.numel()))
        b.grad = a.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    torch.testing.assert_close(clip(one.parameters(), 1.0), norm)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
