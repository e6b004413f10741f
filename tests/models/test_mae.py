"""The masked autoencoder's parts: what is masked, what is predicted, and that masked patches are never seen."""

import pytest
import torch

from models.initialise import initialise
from models.mae import PixelDecoder, normalised, pixels, random_masking
from models.vit import VisionTransformer

PATCH, WIDTH = 4, 16


def encoder() -> VisionTransformer:
    built = VisionTransformer(
        image_size=16,
        patch_size=PATCH,
        width=WIDTH,
        depth=2,
        heads=2,
        feed_forward_width=32,
        layer_scale=1.0,
        position_embedding="sincos",
    )
    initialise(built, 0)
    return built


def test_the_patches_with_the_least_noise_are_kept_in_its_order() -> None:
    kept, rank, mask = random_masking(torch.tensor([[0.5, 0.1, 0.9, 0.2]]), 0.5)
    assert (
        kept.tolist() == [[1, 3]] and rank.tolist() == [[2, 0, 3, 1]] and mask.tolist() == [[True, False, True, False]]
    )


def test_pixels_of_a_patch_are_its_rows_with_channels_last() -> None:
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    found = pixels(images, PATCH)
    assert found.shape == (2, 6, 48)
    for number, (row, column) in enumerate((row, column) for row in range(2) for column in range(3)):
        expected = images[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(found[:, number], expected)


def test_normalised_patches_have_mean_zero_and_unit_variance_and_flat_ones_stay_finite() -> None:
    patches = torch.cat([torch.randn(3, 1, 48) * 5 + 2, torch.full((3, 1, 48), 0.7)], dim=1)
    found = normalised(patches)
    torch.testing.assert_close(found.mean(-1), torch.zeros(3, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.var(-1)[:, 0], torch.ones(3), atol=1e-4, rtol=0)
    assert found.isfinite().all() and found[:, 1].abs().max() < 1e-3


def test_the_encoder_never_sees_a_masked_patch() -> None:
    network, images = encoder(), torch.randn(2, 3, 16, 16)
    kept, _, mask = random_masking(torch.rand(2, 16, generator=torch.Generator().manual_seed(0)), 0.75)
    changed = images.clone()
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand_as(images)
    changed[hidden] = 9.0
    before, after = (network([x], visible=[kept])[0] for x in (images, changed))
    assert before.patches.shape == (2, 4, WIDTH)
    assert torch.equal(before.patches, after.patches) and torch.equal(before.cls, after.cls)


def test_all_patches_in_another_order_are_the_same_tokens_in_that_order() -> None:
    network, images = encoder(), torch.randn(2, 3, 16, 16)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    plain, shuffled = network([images])[0], network([images], visible=[order])[0]
    torch.testing.assert_close(
        shuffled.patches, plain.patches.gather(1, order.unsqueeze(-1).expand(-1, -1, WIDTH)), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(shuffled.cls, plain.cls, atol=1e-6, rtol=1e-5)


def test_fixed_positions_are_not_trained_and_learned_ones_are() -> None:
    assert not encoder().pos_embed.requires_grad and encoder().pos_embed[0, 1:].abs().max() == 1
    assert VisionTransformer(image_size=16, patch_size=4, width=16, heads=2).pos_embed.requires_grad
    with pytest.raises(ValueError, match="position_embedding is one of learned, sincos, rope"):
        VisionTransformer(position_embedding="none")


def test_the_decoder_puts_every_visible_patch_back_at_its_place() -> None:
    """With layers that do nothing, a place's prediction depends on its own token alone: the visible patch's, or the
    mask token's."""
    decoder = PixelDecoder(encoder_width=WIDTH, patch_size=PATCH, width=8, depth=1, heads=2)
    initialise(decoder, 0)
    with torch.no_grad():
        decoder.layers[0].attn.proj.weight.zero_()
        decoder.layers[0].mlp.fc2.weight.zero_()
    cls, visible = torch.randn(1, WIDTH), torch.randn(1, 2, WIDTH)
    kept, rank, _ = random_masking(torch.tensor([[0.5, 0.1, 0.9, 0.2]]), 0.5)
    before = decoder(cls, visible, rank, rows=2)
    for slot, place in enumerate(kept[0].tolist()):
        moved = visible.clone()
        moved[0, slot] += 1.0
        changed = (decoder(cls, moved, rank, rows=2) - before).abs().amax(-1)[0] > 1e-6
        assert changed.tolist() == [number == place for number in range(4)]


def test_the_published_decoder_of_vit_l16_has_its_25_million_parameters() -> None:
    with torch.device("meta"):
        decoder = PixelDecoder(encoder_width=1024, patch_size=16, width=512, depth=8, heads=16)
    # By hand: 8 blocks of 12 d² + 13 d, the projection in, the norm, the head, the mask token.
    assert (
        sum(p.numel() for p in decoder.parameters())
        == 8 * (12 * 512**2 + 13 * 512) + 1024 * 512 + 512 + 2 * 512 + 513 * 768 + 512
    )


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="width 18 must be a multiple of 4"):
        PixelDecoder(encoder_width=WIDTH, patch_size=PATCH, width=18, depth=1, heads=2)
