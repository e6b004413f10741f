"""Attention inside crops: one call a crop size, or one call under a block-diagonal mask, the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Attention, attend, attend_block_diagonal, backend, crop_lengths
from models.vit import VisionTransformer

SHAPES = [(3, 5), (1, 7), (4, 2)]
TOKENS = sum(crops * tokens for crops, tokens in SHAPES)
HEADS, WIDTH = 2, 8


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """A kernel with the whole (T, T) mask written out: what xformers computes without it."""
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.masked_fill(owner[:, None] != owner, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def packed(requires_grad: bool = False) -> Tensor:
    return torch.randn(
        TOKENS, 3 * WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=requires_grad
    )


def test_every_crop_has_its_length_in_the_order_of_the_sequence() -> None:
    assert crop_lengths(SHAPES) == (5, 5, 5, 7, 2, 2, 2, 2)
    assert sum(crop_lengths(SHAPES)) == TOKENS


def test_one_block_diagonal_call_equals_a_call_for_each_crop_size_forward_and_backward() -> None:
    one, other = packed(True), packed(True)
    by_size = torch.cat(attend(one, SHAPES, HEADS))
    (by_block,) = attend_block_diagonal(other, SHAPES, HEADS, naive)
    torch.testing.assert_close(by_block, by_size, atol=1e-12, rtol=1e-12)
    for output in (by_size, by_block):
        (output * torch.arange(WIDTH)).sin().sum().backward()
    torch.testing.assert_close(other.grad, one.grad, atol=1e-12, rtol=1e-12)


def test_both_equal_attention_over_each_crop_by_itself_in_timms_layout() -> None:
    qkv, alone = packed(), []
    for part in qkv.split(list(crop_lengths(SHAPES))):
        q, k, v = part.view(1, len(part), 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        alone.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(part), WIDTH))
    torch.testing.assert_close(torch.cat(attend(qkv, SHAPES, HEADS)), torch.cat(alone), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        attend_block_diagonal(qkv, SHAPES, HEADS, naive)[0], torch.cat(alone), atol=1e-12, rtol=1e-12
    )


def test_the_module_uses_the_backend_that_it_is_given() -> None:
    module = Attention(
        WIDTH, HEADS, lambda qkv, shapes, heads: attend_block_diagonal(qkv, shapes, heads, naive)
    ).double()
    plain = Attention(WIDTH, HEADS).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x, SHAPES), plain(x, SHAPES), atol=1e-12, rtol=1e-12)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'sdpa' or 'xformers', not 'flash'"):
        backend("flash")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_xformers_without_a_cuda_device_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"needs a CUDA device and there is none here: use attention=sdpa"):
        VisionTransformer(image_size=16, patch_size=8, width=8, depth=1, heads=2, attention="xformers")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_xformers_computes_what_sdpa_computes() -> None:
    pytest.importorskip("xformers", reason="xformers isn't installed")
    qkv = torch.randn(
        TOKENS, 3 * 128, device="cuda", dtype=torch.float16, generator=torch.Generator("cuda").manual_seed(0)
    )
    one, other = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    (found,), expected = backend("xformers")(one, SHAPES, 2), torch.cat(attend(other, SHAPES, 2))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    found.float().sin().sum().backward()
    expected.float().sin().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, atol=2e-3, rtol=2e-2)
