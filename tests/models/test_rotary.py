"""Rotary positions: angles written out, distances that they tell, gradients, and precision."""

import math

import pytest
import torch
from torch import Tensor

from models.attention import KeysWithoutBias
from models.rotary import Turns, turn, turns_of_grid
from models.vit import VisionTransformer
from tests.models.test_vit import images, network

CPU = torch.device("cpu")
HEADS, HEAD_WIDTH = 2, 8
ROPE = {"position_embedding": "rope", "registers": 2, "qkv_bias": "no_key"}


def grid(rows: int, columns: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Turns:
    return turns_of_grid(rows, columns, HEAD_WIDTH, scale, CPU, dtype)


def by_complex_numbers(qkv: Tensor, shapes: list[tuple[int, int]], grids: list[tuple[int, int]]) -> Tensor:
    """The same with each pair of numbers as a complex one, multiplied by e^(i · angle), patch by patch."""
    parts = []
    for part, (crops, tokens), (rows, columns) in zip(
        qkv.split([crops * tokens for crops, tokens in shapes]), shapes, grids, strict=True
    ):
        factors = torch.ones(tokens, HEAD_WIDTH // 2, dtype=torch.complex128)
        for row in range(rows):
            for column in range(columns):
                patch = tokens - rows * columns + row * columns + column
                places = [2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1]
                for i in range(HEAD_WIDTH // 2):
                    axis, which = divmod(i, HEAD_WIDTH // 4)
                    angle = 2 * math.pi * places[axis] / 100 ** (2 * which / (HEAD_WIDTH // 2))
                    factors[patch, i] = complex(math.cos(angle), math.sin(angle))
        x = part.view(crops, tokens, 3, HEADS, HEAD_WIDTH)
        pairs = torch.complex(*x[:, :, :2].chunk(2, dim=-1)) * factors.view(tokens, 1, 1, -1)
        turned = torch.cat([pairs.real, pairs.imag], dim=-1)
        parts.append(torch.cat([turned, x[:, :, 2:]], dim=2).view(part.shape))
    return torch.cat(parts)


def test_queries_and_keys_of_patches_are_turned_and_nothing_else_forward_and_backward() -> None:
    shapes, grids = [(2, 3 + 6), (3, 3 + 4)], [(2, 3), (2, 2)]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(39, 3 * HEADS * HEAD_WIDTH, dtype=torch.float64, generator=generator, requires_grad=True)
    turns = [grid(*size) for size in grids]
    found, expected = turn(qkv, shapes, HEADS, turns), by_complex_numbers(qkv, shapes, grids)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn(qkv.shape, dtype=torch.float64, generator=generator)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), qkv)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    compiled = torch.compile(turn, backend="aot_eager")(qkv, shapes, HEADS, turns)
    torch.testing.assert_close(compiled, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((compiled * weight).sum(), qkv)[0], theirs, atol=1e-12, rtol=1e-12)


def test_products_depend_on_the_way_from_patch_to_patch_alone() -> None:
    query, key = torch.randn(2, 1, HEAD_WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    same = torch.cat([query, key, key], dim=1).repeat(25, 1)  # of one head, the same at every patch
    q, k, _ = turn(same, [(1, 25)], 1, [grid(5, 5)]).view(5, 5, 3, HEAD_WIDTH).unbind(2)
    products = torch.einsum("abd,efd->abef", q, k)
    torch.testing.assert_close(products[1, 1, 2, 3], products[2, 2, 3, 4])
    torch.testing.assert_close(products[4, 0, 3, 1], products[3, 2, 2, 3])
    assert (products[1, 1, 2, 3] - products[1, 1, 3, 2]).abs() > 1e-3  # rows aren't columns


def test_a_scale_multiplies_every_angle() -> None:
    once, twice = grid(3, 2), grid(3, 2, 2.0)
    torch.testing.assert_close(twice.cos, once.cos.square() - once.sin.square())
    torch.testing.assert_close(twice.sin, 2 * once.sin * once.cos)


def test_angles_stay_in_float32_for_a_network_in_bfloat16() -> None:
    turns = grid(4, 4, dtype=torch.bfloat16)
    assert turns.cos.dtype == torch.float32
    qkv = torch.randn(16, 3 * HEADS * HEAD_WIDTH).bfloat16()
    found = turn(qkv, [(1, 16)], HEADS, [turns])
    exact = turn(qkv.double(), [(1, 16)], HEADS, [grid(4, 4)])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16())


def test_an_encoder_with_rotary_positions_takes_images_of_any_size_and_sees_places() -> None:
    vit = network(**ROPE)
    with torch.no_grad():
        for size in (16, 32, 40):
            assert vit([images(1, size)])[0].patches.shape == (1, (size // 8) ** 2, 24)
        whole = images(1, 32)
        there = vit([whole])[0].cls
        assert (vit([whole.flip(-1)])[0].cls - there).abs().max() > 1e-4
        assert (vit([whole], scales=[1.5])[0].cls - there).abs().max() > 1e-4
        torch.testing.assert_close(vit([whole], scales=[1.0])[0].cls, there, atol=0, rtol=0)


def test_a_key_without_bias_gets_no_gradient() -> None:
    vit = network(**ROPE)
    vit([images(2, 32)])[0].cls.square().sum().backward()
    for block in vit.blocks:
        assert isinstance(block.attn.qkv, KeysWithoutBias)
        queries, keys, values = block.attn.qkv.bias.grad.chunk(3)
        assert queries.any() and values.any() and not keys.any()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"position_embedding": "rope", "width": 18, "heads": 3}, "heads' width 6 .* multiple of 4"),
        ({"position_rescale": 2.0}, "set position_embedding=rope, or position_rescale=1"),
    ],
)
def test_settings_that_rotary_positions_do_not_fit_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VisionTransformer(**({"image_size": 32, "patch_size": 8, "depth": 1, "width": 24, "heads": 3} | settings))


def test_a_part_of_the_patches_has_no_rotary_positions() -> None:
    with pytest.raises(ValueError, match="all patches are encoded"):
        network(**ROPE)([images(1, 32)], visible=[torch.tensor([[0, 1]])])
