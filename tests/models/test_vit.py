"""The encoder: packing changes nothing, timm agrees, sizes are the published ones."""

import pytest
import timm
import torch
from torch import Tensor

from models.initialise import initialise
from models.vit import VisionTransformer
from tests.models.drawn_depth import drawn_samples

SETTINGS = {
    "image_size": 32,
    "patch_size": 8,
    "width": 24,
    "depth": 3,
    "heads": 3,
    "feed_forward_width": 40,
    "layer_scale": 0.5,
}

DINOV3 = {"position_embedding": "rope", "qkv_bias": "no_key", "own_cls_norm": True, "own_local_cls_norm": True}


def network(seed: int = 0, **settings: object) -> VisionTransformer:
    """A small ViT whose parameters all differ from their initial values, so that a swapped or dropped one shows."""
    vit = VisionTransformer(**(SETTINGS | settings))  # type: ignore[arg-type]
    initialise(vit, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return vit


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def gradients(vit: VisionTransformer) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in vit.named_parameters() if parameter.grad is not None}
    vit.zero_grad()
    return found


@pytest.mark.parametrize(("feed_forward", "registers"), [("mlp", 0), ("swiglu", 4)])
def test_packed_crops_give_the_outputs_and_gradients_of_single_ones(feed_forward: str, registers: int) -> None:
    vit = network(feed_forward=feed_forward, registers=registers)
    wide, narrow = images(4, 32), images(6, 16, 1)
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(2)) < 0.4

    def objective(tokens: list[Tensor]) -> Tensor:
        return sum((part.sin() * (i + 1)).sum() for i, part in enumerate(tokens))  # type: ignore[return-value]

    packed = [part for tokens in vit([wide, narrow], [mask, None]) for part in tokens]
    objective(packed).backward()
    packed_gradients = gradients(vit)
    alone = []
    for crops, masks in ((wide, mask), (narrow, None)):
        each = [vit([crops[i : i + 1]], [None if masks is None else masks[i : i + 1]])[0] for i in range(len(crops))]
        alone += [torch.cat([getattr(tokens, name) for tokens in each]) for name in ("cls", "registers", "patches")]
    objective(alone).backward()
    alone_gradients = gradients(vit)
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    assert packed_gradients.keys() == alone_gradients.keys() == dict(vit.named_parameters()).keys()
    for name, gradient in packed_gradients.items():
        assert (gradient - alone_gradients[name]).abs().max() <= 5e-6 * alone_gradients[name].abs().max().clamp(
            min=1.0
        ), name


def test_stochastic_depth_equals_skipping_and_scaling_written_out() -> None:
    vit, tiles = network(drop_path=0.5), 4
    wide, narrow = images(2 * tiles, 32), images(3 * tiles, 16, 1)
    views = [(2, vit.tokens_per_crop(32)), (3, vit.tokens_per_crop(16))]
    kept = drawn_samples(views, tiles, group=2, rate=0.5, depth=3, seed=0, step=7, first=0)
    assert kept is not None
    found = vit([wide, narrow], None, kept)

    # The second way: every branch on every sample, times 0 for the dropped and crops / kept for the others.
    tokens = [vit.embed(wide, None), vit.embed(narrow, None)]
    starts = [0, tokens[0].shape[0] * tokens[0].shape[1]]
    for block, branches in zip(vit.blocks, kept, strict=True):
        for branch, which in zip(branches, ("attention", "feed forward"), strict=True):
            rows = set(branch.rows.tolist())
            for i, x in enumerate(tokens):
                count, length = x.shape[:2]
                alive = torch.tensor([starts[i] + crop * length in rows for crop in range(count)])
                scale = count / alive.sum()
                flat = x.flatten(0, 1)
                part = (
                    block.ls1(block.attn(block.norm1(flat), [(count, length)]))
                    if which == "attention"
                    else block.ls2(block.mlp(block.norm2(flat)))
                )
                tokens[i] = x + part.view_as(x) * (alive * scale).view(-1, 1, 1)
    for x, split in zip(tokens, found, strict=True):
        torch.testing.assert_close(vit.norm(x)[:, 0], split.cls, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(vit.norm(x)[:, vit.prefix :], split.patches, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("drop_path", "settings"), [(0.0, {}), (0.5, {}), (0.5, DINOV3)])
def test_the_last_block_computes_the_wanted_tokens_alone_with_the_same_outputs_and_gradients(
    drop_path: float, settings: dict
) -> None:
    vit, tiles = network(drop_path=drop_path, registers=2, **settings).double(), 4
    wide, narrow = images(2 * tiles, 32).double(), images(3 * tiles, 16, 1).double()
    views = [(2, vit.tokens_per_crop(32)), (3, vit.tokens_per_crop(16))]
    kept = drawn_samples(views, tiles, group=2, rate=drop_path, depth=3, seed=0, step=7, first=0)
    mask = torch.rand(2 * tiles, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    seen = []
    hook = vit.blocks[-1].mlp.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))

    whole = vit([wide, narrow], [mask, None], kept)
    everything = [whole[0].cls, whole[0].patches[mask], whole[1].cls]
    sum((part.sin() * (i + 1)).sum() for i, part in enumerate(everything)).backward()  # type: ignore[union-attr]
    of_everything = gradients(vit)
    some = vit([wide, narrow], [mask, None], kept, wanted=[mask.flatten().nonzero()[:, 0], None])
    wanted = [some[0].cls, some[0].patches, some[1].cls]
    sum((part.sin() * (i + 1)).sum() for i, part in enumerate(wanted)).backward()  # type: ignore[union-attr]
    of_wanted = gradients(vit)
    hook.remove()

    assert some[0].registers.numel() == some[1].patches.numel() == 0
    for one, other in zip(everything, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert of_everything.keys() == of_wanted.keys()
    for name, gradient in of_everything.items():
        torch.testing.assert_close(gradient, of_wanted[name], atol=1e-10, rtol=1e-10)
    assert seen[1] <= int(mask.sum()) + 5 * tiles < seen[0]


@pytest.mark.parametrize(
    ("architecture", "ours", "theirs"),
    [
        ("vit_tiny_patch16_224", {"feed_forward": "mlp"}, {}),
        ("vit_tiny_patch16_224", {"feed_forward": "mlp", "registers": 4}, {"reg_tokens": 4, "no_embed_class": True}),
        (
            "vit_tiny_patch16_224",
            {"feed_forward": "swiglu", "layer_scale": 0.0},
            {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "init_values": None},
        ),
    ],
)
def test_timm_loads_the_weights_strictly_and_gives_the_same_features(
    architecture: str, ours: dict, theirs: dict
) -> None:
    vit = network(**ours)
    hidden = SETTINGS["feed_forward_width"] * (2 if ours["feed_forward"] == "swiglu" else 1)
    reference = timm.create_model(
        architecture,
        num_classes=0,
        global_pool="token",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        **({"mlp_ratio": hidden / 24, "init_values": 0.5} | theirs),
    ).eval()
    state = {name: value for name, value in vit.state_dict().items() if name != "mask_token"}
    if vit.reg_token is not None:  # timm's register models add the class token's position to the token itself
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    reference.load_state_dict(state, strict=True)
    batch = images(3, 32)
    with torch.no_grad():
        expected = reference.forward_features(batch)
        cls, patches = vit.features(batch)
    torch.testing.assert_close(cls, expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches, expected[:, vit.prefix :], atol=1e-5, rtol=1e-5)


# name: settings, published parameters, and the tokens that we count beside our mask token: timm's DINOv2 register
# models have no position for the class token, Virchow2 has one for each of its four registers too.
PUBLISHED = {
    "Prov-GigaPath ViT-g/16": (
        dict(patch_size=16, width=1536, depth=40, heads=24, feed_forward="swiglu", feed_forward_width=4096),
        1_134_953_984,
        0,
    ),
    "OpenMidnight ViT-g/14": (
        dict(
            patch_size=14, width=1536, depth=40, heads=24, feed_forward="swiglu", feed_forward_width=4096, registers=4
        ),
        1_134_774_272,
        1,
    ),
    "Virchow ViT-H/14": (
        dict(patch_size=14, width=1280, depth=32, heads=16, feed_forward="swiglu", feed_forward_width=3416),
        631_229_184,
        0,
    ),
    "Virchow2 ViT-H/14": (
        dict(
            patch_size=14, width=1280, depth=32, heads=16, feed_forward="swiglu", feed_forward_width=3416, registers=4
        ),
        631_239_424,
        -4,
    ),
    "UNI ViT-L/16": (
        dict(patch_size=16, width=1024, depth=24, heads=16, feed_forward="mlp", feed_forward_width=4096),
        303_350_784,
        0,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_have_the_published_numbers_of_parameters(name: str) -> None:
    settings, published, tokens = PUBLISHED[name]
    with torch.device("meta"):
        vit = VisionTransformer(image_size=224, **settings)
    counted = sum(parameter.numel() for parameter in vit.parameters())
    assert counted - (1 + tokens) * settings["width"] == published


def test_class_tokens_own_norms_are_theirs_alone_and_that_of_local_crops_only_while_training() -> None:
    vit = network(registers=2, **DINOV3)
    crops = [images(2, 32), images(3, 16, 1)]
    last = []
    vit.blocks[-1].register_forward_hook(lambda _, inputs, result: last.append(result))
    with torch.no_grad():
        for training, local_norm in ((True, vit.local_cls_norm), (False, vit.cls_norm)):
            wide, narrow = vit.train(training)(crops)
            global_tokens, local_tokens = last.pop().split([2 * 19, 3 * 7])
            for (tokens, found), norm in zip(
                ((global_tokens.view(2, 19, 24), wide), (local_tokens.view(3, 7, 24), narrow)),
                (vit.cls_norm, local_norm),
                strict=True,
            ):
                torch.testing.assert_close(torch.cat([found.cls.unsqueeze(1), found.registers], 1), norm(tokens[:, :3]))
                torch.testing.assert_close(found.patches, vit.norm(tokens[:, 3:]))


def test_masked_patches_are_not_seen_and_the_others_are() -> None:
    vit = network()
    one, other = images(1, 32), images(1, 32, 9)
    mask = torch.ones(1, 16, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(vit([one], [mask])[0].cls, vit([other], [mask])[0].cls)
        assert not torch.allclose(vit([one])[0].cls, vit([other])[0].cls, atol=1e-3)
        mask[0, 5] = False
        changed = one.clone()
        changed[:, :, 8:16, 8:16] += 1  # patch 5: second row, second column
        assert not torch.allclose(vit([one], [mask])[0].cls, vit([changed], [mask])[0].cls, atol=1e-4)


def test_a_crop_never_attends_to_another() -> None:
    vit = network()
    batch = images(4, 32)
    with torch.no_grad():
        before = vit([batch, images(2, 16, 1)])[0].cls
        batch[3] = 100.0
        after = vit([batch, images(2, 16, 2)])[0].cls
    assert torch.equal(before[:3], after[:3])


@pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.1)])
def test_positions_are_resampled_as_each_release_of_dinov2_does(antialias: bool, offset: float) -> None:
    vit = network(position_antialias=antialias, position_offset=offset)
    square = vit.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    arguments = {"scale_factor": ((2 + offset) / 4,) * 2} if offset else {"size": (2, 2)}
    expected = torch.nn.functional.interpolate(square, mode="bicubic", antialias=antialias, **arguments)  # type: ignore[arg-type]
    cls, positions = vit.positions(2, 2)
    assert torch.equal(cls, vit.pos_embed[:, :1])
    torch.testing.assert_close(positions, expected.permute(0, 2, 3, 1).flatten(1, 2))
    assert torch.equal(vit.positions(4, 4)[1], vit.pos_embed[:, 1:])


def test_the_patch_embedding_is_the_strided_convolution_it_stands_for() -> None:
    vit = network()
    batch = images(2, 32).to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        vit.patch_embed(batch), vit.patch_embed.proj(batch).flatten(2).transpose(1, 2), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"width": 25}, "width 25 is not divisible by heads 3"),
        ({"image_size": 30}, "image_size 30 is not divisible by patch_size 8"),
        ({"feed_forward": "moe"}, "'mlp' or 'swiglu'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VisionTransformer(**(SETTINGS | settings))


def test_an_image_that_the_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"30 × 30 .* patch_size 8"):
        network()([images(1, 30)])
