"""DINOv3's encoders cross over to its own names, timm and transformers and back with every feature as it was."""

from pathlib import Path

import pytest
import timm as real_timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.formats import checkpoint_file, dinov2, timm, timm_dinov3
from models.formats import transformers_dinov3 as of_transformers
from models.formats.dinov3 import read_dinov3, write_dinov3
from models.formats.published import PublishedWeights
from models.formats.transformers import write_transformers
from models.vit import VisionTransformer
from tests.models.formats.test_formats import (
    DEPTH,
    HEADS,
    PATCH,
    SIZE,
    WIDTH,
    assert_same_features,
    built,
    images,
    network,
    perturb,
)

KINDS = [("mlp", 0, "no_key"), ("mlp", 4, "none"), ("swiglu", 4, "no_key")]
ROPE = {"position_embedding": "rope", "norm_epsilon": 1e-5}


def ours_of(feed_forward: str, registers: int, qkv_bias: str, **changes: object) -> VisionTransformer:
    vit = network(feed_forward, registers, **(ROPE | {"qkv_bias": qkv_bias} | changes))
    with torch.no_grad():
        for block in vit.blocks if qkv_bias == "no_key" else ():
            block.attn.qkv.bias[WIDTH : 2 * WIDTH] = 0  # as they are where nothing has moved them
    return vit


def timm_model(vit: VisionTransformer, name: str = "vit_small_patch16_dinov3") -> nn.Module:
    """timm's real class, in the small network's sizes."""
    settings = {
        "patch_size": PATCH,
        "width": WIDTH,
        "depth": DEPTH,
        "heads": HEADS,
        "feed_forward": vit.feed_forward,
        "feed_forward_width": vit.blocks[0].mlp.fc2.in_features,
        "registers": vit.prefix - 1,
        "layer_scale": 0.5,
        "norm_epsilon": vit.norm_epsilon,
        "qkv_bias": vit.qkv_bias,
    }
    architecture, arguments = timm_dinov3.timm_dinov3_architecture(settings, SIZE)
    assert architecture.startswith(name)
    return perturb(real_timm.create_model(architecture, **arguments))


def timm_features(model: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        features = model.forward_features(images(size))
    return features[:, 0], features[:, model.num_prefix_tokens :]


@pytest.mark.parametrize(("feed_forward", "registers", "qkv_bias"), KINDS)
def test_timms_real_class_has_our_features_read_and_written(feed_forward: str, registers: int, qkv_bias: str) -> None:
    ours = ours_of(feed_forward, registers, qkv_bias)
    theirs = timm_model(ours)
    for size in (SIZE, SIZE + 2 * PATCH):
        published = timm_dinov3.read_timm_dinov3(theirs.state_dict(), heads=HEADS)
        assert_same_features(built(published), *timm_features(theirs, size), size)
    written = timm_dinov3.write_timm_dinov3(ours)
    theirs.load_state_dict(written, strict=True)
    assert_same_features(ours, *timm_features(theirs, SIZE))
    found = checkpoint_file.read_checkpoint_file(written)  # by its names alone
    assert found.format == "timm" and found.heads is None
    back, _ = found.fit(ours)
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items() if name in back)


@pytest.mark.parametrize(("feed_forward", "registers", "qkv_bias"), [*KINDS, ("mlp", 2, "all")])
def test_transformers_real_class_has_our_features_read_and_written(
    tmp_path: Path, feed_forward: str, registers: int, qkv_bias: str
) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers isn't installed: pip install 'slidewright[test]'"
    )
    ours = ours_of(feed_forward, registers, qkv_bias)
    published = PublishedWeights("ours", dict(ours.state_dict()), HEADS, norm_epsilon=1e-5)
    settings = published.settings() | {"position_rescale": 2.0}
    assert settings["qkv_bias"] == qkv_bias
    config = of_transformers.dinov3_config(settings, SIZE)
    theirs = perturb(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**config)))
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    written = of_transformers.write_transformers_dinov3(ours)
    assert written.keys() == saved.keys()
    for weights in (saved, theirs.state_dict()):
        read = built(of_transformers.read_transformers_dinov3(weights, theirs.config.to_dict()))
        for size in (SIZE, SIZE + 2 * PATCH):
            with torch.no_grad():
                states = theirs(pixel_values=images(size)).last_hidden_state
            assert_same_features(read, states[:, 0], states[:, 1 + registers :], size)
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = transformers.DINOv3ViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        states = again.eval()(pixel_values=images(SIZE)).last_hidden_state
    assert_same_features(ours, states[:, 0], states[:, 1 + registers :])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_theta": 10.0}, "rope_theta is 10.0, ours 100"),
        ({"hidden_act": "relu"}, "hidden_act is relu, ours gelu"),
        ({"mlp_bias": False}, "mlp_bias is False"),
    ],
)
def test_settings_of_transformers_that_change_what_weights_compute_are_refused(changes: dict, sentence: str) -> None:
    weights = of_transformers.write_transformers_dinov3(ours_of("mlp", 0, "no_key"))
    with pytest.raises(ValueError, match=sentence):
        of_transformers.read_transformers_dinov3(weights, {"num_attention_heads": HEADS} | changes)


@pytest.mark.parametrize("norms", [{}, {"own_cls_norm": True, "own_local_cls_norm": True}])
@pytest.mark.parametrize(("feed_forward", "registers", "qkv_bias"), KINDS)
def test_its_own_names_come_back_wherever_they_are_nested(
    feed_forward: str, registers: int, qkv_bias: str, norms: dict
) -> None:
    ours = ours_of(feed_forward, registers, qkv_bias, **norms)
    written = write_dinov3(ours)
    for weights in (written, {"teacher": {f"backbone.{name}": tensor for name, tensor in written.items()}}):
        published = checkpoint_file.read_checkpoint_file(weights)
        assert published.format == "DINOv3" and published.heads == HEADS
        published.norm_epsilon = 1e-5
        back = built(published)
        assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


# What doesn't fit ----------------------------------------------------------------------------------------------------


def test_periods_rounded_to_bfloat16_are_said_and_others_are_refused() -> None:
    weights = write_dinov3(ours_of("mlp", 0, "none"))
    weights["rope_embed.periods"] *= 1.002
    ours = ours_of("mlp", 0, "none")
    _, said = read_dinov3(weights).fit(ours)
    assert any("rounded to bfloat16" in sentence for sentence in said)
    assert any("epsilon" in sentence for sentence in said)
    with pytest.raises(ValueError, match=r"rope_embed\.periods aren't the powers of 100"):
        read_dinov3(weights | {"rope_embed.periods": weights["rope_embed.periods"] * 1.5})
    with pytest.raises(ValueError, match=r"missing: rope_embed\.periods"):
        read_dinov3({"storage_tokens": torch.zeros(1, 4, 8), "cls_token": torch.zeros(1, 1, 8)})


@pytest.mark.parametrize(
    ("theirs", "ours", "sentence"),
    [
        ({}, {"norm_epsilon": 1e-6}, r"epsilon 1e-05 and the model's 1e-06: set model\.norm_epsilon=1e-05"),
        ({}, {"position_embedding": "learned"}, r"rotary positions, .* set model\.position_embedding=rope"),
        ({"position_embedding": "learned"}, {}, r"a grid of positions, .* set model\.position_embedding=learned"),
        (
            {},
            {"norm_epsilon": 1e-6, "position_embedding": "learned"},
            r"rotary positions, .* set model\.position_embedding=rope model\.norm_epsilon=1e-05",
        ),
        ({"qkv_bias": "all"}, {}, r"attn\.qkv\.bias are not zero, .* set model\.qkv_bias=all"),
        ({"qkv_bias": "no_key"}, {"qkv_bias": "none"}, r"attn\.qkv\.bias are not zero, .* set model\.qkv_bias=no_key"),
        ({"own_cls_norm": True}, {}, r"unexpected: cls_norm\.bias, cls_norm\.weight"),
        ({}, {"own_cls_norm": True}, r"missing: cls_norm\.bias, cls_norm\.weight"),
        ({"own_local_cls_norm": True}, {}, r"unexpected: local_cls_norm\.bias"),
    ],
)
def test_a_part_that_does_not_fit_is_named_with_its_setting(theirs: dict, ours: dict, sentence: str) -> None:
    source = ours_of("mlp", 4, **({"qkv_bias": "no_key"} | theirs))
    published = PublishedWeights("its run", dict(source.state_dict()), HEADS, norm_epsilon=1e-5)
    with pytest.raises(ValueError, match=sentence):
        published.fit(ours_of("mlp", 4, **({"qkv_bias": "no_key"} | ours)))


def test_biases_that_are_zero_come_and_go_and_a_local_norm_starts_as_the_others() -> None:
    bare = timm_dinov3.write_timm_dinov3(ours_of("mlp", 4, "none"))
    biased = ours_of("mlp", 4, "no_key", own_local_cls_norm=True)
    weights, said = timm_dinov3.read_timm_dinov3(bare, heads=HEADS).fit(biased)
    assert weights.keys() == biased.state_dict().keys() - {"mask_token"}
    assert not weights["blocks.1.attn.qkv.bias"].any()
    assert torch.equal(weights["local_cls_norm.weight"], weights["norm.weight"])
    assert any("start at zero" in sentence for sentence in said) and any("starts as its norm" in one for one in said)
    published = PublishedWeights("its run", {k: t for k, t in weights.items() if "local" not in k}, HEADS)
    published.norm_epsilon = 1e-5
    back, said = published.fit(ours_of("mlp", 4, "none"))
    assert "blocks.1.attn.qkv.bias" not in back and any("the model has none" in sentence for sentence in said)


def test_what_timm_and_transformers_cannot_express_is_refused() -> None:
    own = ours_of("mlp", 4, "no_key", own_cls_norm=True)
    for write in (timm_dinov3.write_timm_dinov3, of_transformers.write_transformers_dinov3):
        with pytest.raises(ValueError, match=r"model\.own_cls_norm can't be exported"):
            write(own)
    with pytest.raises(ValueError, match=r"no biases of keys: train with model\.qkv_bias=no_key"):
        timm_dinov3.write_timm_dinov3(ours_of("mlp", 4, "all"))
    with pytest.raises(ValueError, match=r"norms of epsilon 1e-05, .*=1e-06: export format=transformers"):
        timm_dinov3.timm_dinov3_architecture({"norm_epsilon": 1e-6}, SIZE)
    with pytest.raises(ValueError, match="rotary positions, and this network position_embedding=learned"):
        write_dinov3(network())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"position_embedding": "rope"}, r"model\.position_embedding=rope"),
        ({"qkv_bias": "none", "norm_epsilon": 1e-5}, r"model\.qkv_bias=none, model\.norm_epsilon=1e-05"),
        ({"own_cls_norm": True}, r"model\.own_cls_norm=true"),
    ],
)
def test_formats_made_for_dinov2_have_no_place_for_these_parts(settings: dict, sentence: str) -> None:
    writers = (dinov2.write_dinov2, lambda net: timm.write_timm(net, SIZE), lambda net: write_transformers(net, SIZE))
    for write in writers:
        with pytest.raises(ValueError, match=f"has no place for {sentence}: hand on the run itself"):
            write(network(**settings))
