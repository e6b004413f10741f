"""Encoders cross over to timm, DINOv2 and transformers and back with every feature as it was."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from models.formats import checkpoint_file, dinov2
from models.formats import timm as timm_format
from models.formats import transformers as transformers_format
from models.formats.published import PublishedWeights, Weights, require_finite
from models.initialise import initialise
from models.vit import VisionTransformer

GRID, PATCH, WIDTH, DEPTH, HEADS = 4, 8, 24, 2, 3
SIZE = GRID * PATCH
KINDS = [("mlp", 0), ("mlp", 4), ("swiglu", 0), ("swiglu", 4)]


def perturb(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every weight off its initial value, so that a swapped, dropped or transposed one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def network(feed_forward: str = "mlp", registers: int = 0, **changes: object) -> VisionTransformer:
    settings = dict(
        image_size=SIZE,
        patch_size=PATCH,
        width=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        feed_forward=feed_forward,
        feed_forward_width=64 if feed_forward == "swiglu" else 96,
        registers=registers,
        layer_scale=0.5,
    )
    vit = VisionTransformer(**(settings | changes))  # type: ignore[arg-type]
    initialise(vit, 0)
    return perturb(vit)  # type: ignore[return-value]


def built(published: PublishedWeights, **changes: object) -> VisionTransformer:
    """The network that a published encoder describes, with its weights, loaded strictly."""
    vit = VisionTransformer(**(published.settings() | changes)).eval()
    weights, _ = published.fit(vit)
    vit.load_state_dict({"mask_token": torch.zeros(1, WIDTH)} | weights, strict=True)
    return vit


def images(size: int = SIZE) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(size))


def assert_same_features(
    ours: VisionTransformer, cls: Tensor, patches: Tensor, size: int = SIZE, **tolerance: float
) -> None:
    with torch.no_grad():
        found = ours.features(images(size))
    torch.testing.assert_close(found[0], cls, **({"atol": 1e-5, "rtol": 1e-5} | tolerance))
    torch.testing.assert_close(found[1], patches, **({"atol": 1e-5, "rtol": 1e-5} | tolerance))


# timm ----------------------------------------------------------------------------------------------------------------


def timm_model(feed_forward: str, registers: int, **changes: object) -> nn.Module:
    swiglu = (
        {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 128 / WIDTH}
        if feed_forward == "swiglu"
        else {"mlp_ratio": 4}
    )
    settings = dict(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=0,
        global_pool="token",
        init_values=0.5,
        reg_tokens=registers,
        dynamic_img_size=True,
    )
    return perturb(timm.create_model("vit_tiny_patch16_224", **(settings | swiglu | changes)))


def timm_features(model: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        features = model.forward_features(images(size))
    return features[:, 0], features[:, model.num_prefix_tokens :]


@pytest.mark.parametrize("size", [SIZE, SIZE - PATCH, SIZE + 2 * PATCH])
@pytest.mark.parametrize("folded", [False, True], ids=["class position", "no_embed_class"])
@pytest.mark.parametrize(("feed_forward", "registers"), KINDS)
def test_a_timm_model_read_here_has_timms_features_at_every_size(
    feed_forward: str, registers: int, folded: bool, size: int
) -> None:
    theirs = timm_model(feed_forward, registers, no_embed_class=folded)
    ours = built(timm_format.read_timm(theirs.state_dict(), heads=HEADS))
    assert_same_features(ours, *timm_features(theirs, size), size)


@pytest.mark.parametrize(("feed_forward", "registers"), KINDS)
def test_a_network_written_for_timm_loads_strictly_there_and_comes_back(feed_forward: str, registers: int) -> None:
    ours = network(feed_forward, registers)
    theirs = timm_model(feed_forward, registers, no_embed_class=bool(registers))
    theirs.load_state_dict(timm_format.write_timm(ours, SIZE), strict=True)
    assert_same_features(ours, *timm_features(theirs, SIZE))
    for size in (SIZE, SIZE + PATCH):
        assert_same_features(
            built(timm_format.read_timm(theirs.state_dict(), heads=HEADS)), *timm_features(theirs, size), size
        )


def test_a_timm_model_without_layer_scale_and_with_a_classifier_is_read() -> None:
    theirs = timm_model("mlp", 0, init_values=None, num_classes=5)
    published = timm_format.read_timm(theirs.state_dict(), heads=HEADS)
    assert published.settings()["layer_scale"] == 0.0 and published.left_out == ["head"]
    assert_same_features(built(published), *timm_features(theirs, SIZE))


def test_positions_that_fit_two_grids_are_refused_until_the_grid_is_told() -> None:
    theirs = timm_model(
        "mlp", 4, img_size=3 * PATCH, no_embed_class=True
    )  # 9 positions: 3 × 3, or 2 × 2 beside five tokens
    with pytest.raises(ValueError, match="fit two grids"):
        timm_format.read_timm(theirs.state_dict())
    assert_same_features(
        built(timm_format.read_timm(theirs.state_dict(), heads=HEADS, grid=3)), *timm_features(theirs, 24), 24
    )
    with pytest.raises(ValueError, match="no square grid"):
        timm_format.read_timm(theirs.state_dict() | {"pos_embed": torch.zeros(1, 8, WIDTH)})


# DINOv2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dinov2_step_swiglu_sinkhorn_separate.safetensors", "dinov2_step_mlp_centering_shared.safetensors"]
)
def test_a_dinov2_checkpoint_has_the_references_features_at_both_crop_sizes(goldens: Path, name: str) -> None:
    with safe_open(goldens / name, "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in sorted(file.keys())}
    checkpoint = {
        "teacher": {key.removeprefix("student."): t for key, t in tensors.items() if key.startswith("student.")},
        "iteration": 7,
    }
    published = checkpoint_file.read_checkpoint_file(checkpoint)
    assert published.format == "DINOv2" and {"teacher.dino_head", "iteration"} <= set(published.left_out)
    published.heads = int(meta["heads"])
    _, *antialias, _, offset = meta[
        "pos_embed_interpolation"
    ].split()  # this run's own, whatever a release with its registers has
    vit = VisionTransformer(
        **(published.settings() | {"position_antialias": antialias == ["antialias"], "position_offset": float(offset)})
    )
    weights, _ = published.fit(vit)
    vit.load_state_dict(weights, strict=True)
    with torch.no_grad():
        wide, narrow = vit([tensors["in.global_crops"], tensors["in.local_crops"]])
    torch.testing.assert_close(wide.cls, tensors["out.student_cls"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide.patches, tensors["out.student_patches"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(narrow.cls, tensors["out.student_local_cls"], atol=1e-5, rtol=1e-5)


def chunked(weights: dict[str, Tensor], size: int = 1) -> dict[str, Tensor]:
    """DINOv2's names for FSDP chunks: a block keeps its number inside its chunk."""
    return {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // size}.{m[1]}.", name): tensor
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize(("feed_forward", "registers"), KINDS)
def test_a_network_written_for_dinov2_is_understood_by_timms_own_conversion_and_comes_back(
    feed_forward: str, registers: int
) -> None:
    ours = network(
        feed_forward, registers, position_antialias=bool(registers), position_offset=0.0 if registers else 0.1
    )
    written = dinov2.write_dinov2(ours)
    assert ("register_tokens" in written) == bool(registers) and ("blocks.1.mlp.w12.weight" in written) == (
        feed_forward == "swiglu"
    )
    theirs = timm_model(feed_forward, registers, no_embed_class=bool(registers))
    theirs.load_state_dict(checkpoint_filter_fn(dict(written), theirs), strict=True)
    assert_same_features(ours, *timm_features(theirs, SIZE))
    for weights in (
        written,
        chunked(written),
        {f"teacher.backbone.{k}": t for k, t in written.items()},
        {"model": {f"module.{k}": t for k, t in written.items()}},
    ):
        published = checkpoint_file.read_checkpoint_file(weights)
        published.heads = HEADS
        back = built(published)
        assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
        for size in (SIZE, SIZE - PATCH):  # the conventions of the release are taken with the weights
            with torch.no_grad():
                assert_same_features(back, *ours.features(images(size)), size, atol=0, rtol=0)


def test_the_teacher_is_taken_and_what_else_a_checkpoint_holds_is_named() -> None:
    good, other = dinov2.write_dinov2(network("mlp", 4)), dinov2.write_dinov2(network("mlp", 4))
    checkpoint = {
        "model": (
            {f"student.backbone.{k}": t + 1 for k, t in other.items()}
            | {f"teacher.backbone.{k}": t for k, t in good.items()}
        )
    }
    checkpoint["model"]["teacher.dino_head.last_layer.weight_v"] = torch.zeros(3)
    published = checkpoint_file.read_checkpoint_file(checkpoint | {"iteration": 3})
    assert torch.equal(published.weights["cls_token"], good["cls_token"])
    assert published.left_out == ["iteration", "model.student.backbone", "model.teacher.dino_head"]
    assert published.place == "model.teacher.backbone"


NESTED = [
    ("_orig_mod.{}", ""),
    ("module._orig_mod.{}", ""),
    ("model.{}", "model"),
    ("encoder.{}", "encoder"),
    ("student.{}", "student"),
    ("model.module.encoder._orig_mod.{}", "model.encoder"),
    ("_orig_mod.teacher._fsdp_wrapped_module.backbone.{}", "teacher.backbone"),
    ("visual.trunk.{}", "visual.trunk"),
]


@pytest.mark.parametrize(("pattern", "place"), NESTED)
@pytest.mark.parametrize("container", ["", "state_dict", "model_ema"])
@pytest.mark.parametrize(
    "convert", [dinov2.write_dinov2, lambda net: timm_format.write_timm(net, SIZE)], ids=["dinov2", "timm"]
)
def test_an_encoder_is_found_by_its_keys_wherever_it_is_nested(
    pattern: str, place: str, container: str, convert: Callable[[VisionTransformer], Weights]
) -> None:
    ours = network("mlp", 4)
    held: dict = {pattern.format(name): tensor for name, tensor in convert(ours).items()}
    if container:
        held = {container: held, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    published = checkpoint_file.read_checkpoint_file(held)
    bare = checkpoint_file.read_checkpoint_file(convert(ours))
    assert published.weights.keys() == bare.weights.keys()
    assert all(torch.equal(published.weights[name], tensor) for name, tensor in bare.weights.items())
    assert published.place == ".".join(part for part in (container, place) if part)
    assert (
        published.left_out == (["epoch", "optimizer.state.0" if place else "optimizer"] if container else [])
        or container
    )


def test_names_of_wrappers_inside_of_an_encoder_are_dropped() -> None:
    weights = {
        re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", name): t for name, t in dinov2.write_dinov2(network()).items()
    }
    assert any("_orig_mod" in name for name in weights)
    assert checkpoint_file.read_checkpoint_file(weights).weights.keys() == dinov2.write_dinov2(network()).keys()


def test_of_two_encoders_that_nothing_tells_apart_none_is_taken() -> None:
    weights = dinov2.write_dinov2(network())
    held = {"first": weights, "second": {"backbone." + name: tensor + 1 for name, tensor in weights.items()}}
    with pytest.raises(
        ValueError,
        match=(
            r"it holds 2 encoders, first, second\.backbone: name the one that is meant behind the file,"
            r" FILE::second\.backbone"
        ),
    ):
        checkpoint_file.read_checkpoint_file(held)
    chosen = checkpoint_file.read_checkpoint_file(held, "second.backbone")
    assert torch.equal(chosen.weights["cls_token"], weights["cls_token"] + 1) and all(
        name.startswith("first") for name in chosen.left_out
    )
    with pytest.raises(ValueError, match=r"there is no encoder at third, but at first, second\.backbone: name"):
        checkpoint_file.read_checkpoint_file(held, "third")
    both = {"teacher": held["first"], "teacher_ema": held["second"]}
    with pytest.raises(ValueError, match=r"2 encoders, teacher, teacher_ema\.backbone: name .*FILE::teacher_ema"):
        checkpoint_file.read_checkpoint_file(both)
    student = {"student.backbone": weights, "other": {name: tensor + 1 for name, tensor in weights.items()}}
    assert checkpoint_file.read_checkpoint_file(student).place == "other"


def test_the_decoder_that_mae_keeps_beside_its_encoder_is_left_out_and_said() -> None:
    ours = network("mlp")
    encoder = timm_format.write_timm(ours, SIZE)
    decoder = {
        "decoder_pos_embed": torch.zeros(1, 17, 32),
        "decoder_blocks.0.norm1.weight": torch.zeros(32),
        "mask_token": torch.zeros(1, 1, 32),
    }
    for held in (encoder | decoder, {"model": encoder | decoder}):
        published = checkpoint_file.read_checkpoint_file(held)
        assert published.format == "timm" and published.left_out == ["decoder"]
        _, said = published.fit(ours)
        assert "not part of the encoder, left out: decoder" in said


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("visual.class_embedding", "visual.conv1.weight"), "weights of CLIP's vision transformer"),
        (("vision_model.embeddings.patch_embedding.weight",), "weights of SigLIP's"),
        (("layers.0.blocks.0.attn.relative_position_bias_table",), "weights of a Swin"),
        (("layer4.0.conv1.weight", "conv1.weight"), "weights of a ResNet"),
        (("gain", "offset"), "none of its 2 tensors is a cls_token, the first are gain, offset"),
        ((), "it holds no tensors"),
    ],
)
def test_what_is_known_and_not_read_is_named(names: tuple[str, ...], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        checkpoint_file.read_checkpoint_file({"model": dict.fromkeys(names, torch.zeros(1)), "epoch": 1})


def test_a_tensor_that_is_not_finite_is_named() -> None:
    weights = dinov2.write_dinov2(network())
    weights["blocks.1.norm1.bias"][0] = float("nan")
    with pytest.raises(ValueError, match=r"^blocks\.1\.norm1\.bias holds values that aren't finite$"):
        require_finite(checkpoint_file.read_checkpoint_file(weights).weights)


def test_a_518_pixel_grid_is_resampled_to_the_networks_as_its_release_resamples_it() -> None:
    for registers, antialias, offset in ((0, False, 0.1), (4, True, 0.0)):
        source = network("mlp", registers, image_size=SIZE * 2, position_antialias=antialias, position_offset=offset)
        published = checkpoint_file.read_checkpoint_file(dinov2.write_dinov2(source))
        published.heads = HEADS
        small = network("mlp", registers)
        weights, said = published.fit(small)
        small.load_state_dict(weights, strict=True)
        assert any("positions resampled from 8 × 8 to 4 × 4, as DINOv2 does it" in sentence for sentence in said)
        with torch.no_grad():
            assert_same_features(small, *source.features(images()))


def test_positions_that_are_no_square_grid_are_refused() -> None:
    weights = dinov2.write_dinov2(network()) | {"pos_embed": torch.zeros(1, 1 + 12, WIDTH)}
    with pytest.raises(ValueError, match="12 positions of patches are no square grid"):
        checkpoint_file.read_checkpoint_file(weights)


# transformers --------------------------------------------------------------------------------------------------------


def transformers_model(feed_forward: str, registers: int) -> nn.Module:
    transformers = pytest.importorskip(
        "transformers", reason="transformers isn't installed: pip install 'slidewright[test]'"
    )
    settings = dict(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        use_swiglu_ffn=feed_forward == "swiglu",
        mlp_ratio=4,
    )
    if registers:
        return perturb(
            transformers.Dinov2WithRegistersModel(
                transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **settings)
            )
        )
    return perturb(transformers.Dinov2Model(transformers.Dinov2Config(**settings)))


def transformers_features(model: nn.Module, registers: int, size: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        states = model(pixel_values=images(size)).last_hidden_state
    return states[:, 0], states[:, 1 + registers :]


@pytest.mark.parametrize("size", [SIZE, SIZE - PATCH, SIZE + 2 * PATCH])
@pytest.mark.parametrize(("feed_forward", "registers"), KINDS)
def test_a_transformers_model_read_here_has_its_features_at_every_size(
    feed_forward: str, registers: int, size: int
) -> None:
    theirs = transformers_model(feed_forward, registers)
    ours = built(transformers_format.read_transformers(theirs.state_dict(), theirs.config.to_dict()))
    assert_same_features(ours, *transformers_features(theirs, registers, size), size)


@pytest.mark.parametrize(("feed_forward", "registers"), KINDS)
def test_the_names_in_transformers_files_are_read_and_written(
    tmp_path: Path, feed_forward: str, registers: int
) -> None:
    from safetensors.torch import load_file, save_file

    theirs = transformers_model(feed_forward, registers)
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    published = transformers_format.read_transformers(saved, theirs.config.to_dict())
    ours = built(published)
    assert_same_features(ours, *transformers_features(theirs, registers, SIZE))
    written = transformers_format.write_transformers(ours, SIZE)
    assert written.keys() == saved.keys() and all(torch.equal(written[name], saved[name]) for name in saved)
    # The real class loads them from a file with nothing missing and nothing left.
    moved = {name: 1.1 * tensor for name, tensor in written.items()}
    save_file(moved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_features(
        built(transformers_format.read_transformers(moved, theirs.config.to_dict())),
        *transformers_features(again.eval(), registers, SIZE),
    )


@pytest.mark.parametrize(("feed_forward", "registers"), KINDS)
def test_the_config_builds_a_model_of_the_same_shape(feed_forward: str, registers: int) -> None:
    theirs = transformers_model(feed_forward, registers)
    published = transformers_format.read_transformers(theirs.state_dict(), theirs.config.to_dict())
    config = transformers_format.config(published.settings(), SIZE)
    rebuilt = type(theirs)(type(theirs.config)(**config))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_a_network_without_layer_scale_is_written_for_transformers_with_ones() -> None:
    ours = network(layer_scale=0.0)
    theirs = transformers_model("mlp", 0)
    again = built(
        transformers_format.read_transformers(
            transformers_format.write_transformers(ours, SIZE), theirs.config.to_dict()
        )
    )
    with torch.no_grad():
        assert_same_features(again, *ours.features(images()))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "vit"}, "only dinov2 and dinov2_with_registers"),
        ({"hidden_act": "relu"}, "hidden_act is relu, ours gelu"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
    ],
)
def test_settings_that_change_what_weights_compute_are_refused(changes: dict, sentence: str) -> None:
    theirs = transformers_model("mlp", 0)
    with pytest.raises(ValueError, match=sentence):
        transformers_format.read_transformers(theirs.state_dict(), theirs.config.to_dict() | changes)


def test_a_width_that_transformers_cannot_express_is_refused_with_the_way_out() -> None:
    settings = {"width": 24, "feed_forward_width": 50, "registers": 0, "feed_forward": "mlp"}
    with pytest.raises(ValueError, match=r"feed_forward_width=50 at width=24: export format=timm"):
        transformers_format.config(settings, SIZE)


def test_published_sizes_can_be_expressed_in_transformers() -> None:
    for width, hidden, feed_forward in ((384, 1536, "mlp"), (1280, 3416, "swiglu"), (1536, 4096, "swiglu")):
        settings = {
            "width": width,
            "feed_forward_width": hidden,
            "registers": 0,
            "feed_forward": feed_forward,
            "depth": 1,
            "heads": 1,
            "patch_size": 14,
            "layer_scale": 1e-5,
        }
        assert transformers_format.config(settings, 224)["mlp_ratio"] == 4


# What doesn't fit ----------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_weights_are_all_named() -> None:
    weights = timm_format.write_timm(network(), SIZE)
    del weights["blocks.1.mlp.fc2.bias"]
    weights["fc_norm.weight"] = torch.zeros(3)
    weights["norm.bias"] = torch.zeros(5)
    published = timm_format.read_timm(weights, heads=HEADS)
    with pytest.raises(
        ValueError,
        match=(
            r"missing: blocks\.1\.mlp\.fc2\.bias; unexpected: fc_norm\.weight; of another shape: norm\.bias is \(5,\),"
            r" the model's \(24,\)"
        ),
    ):
        published.fit(network())


def test_registers_and_heads_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="missing: reg_token"):
        timm_format.read_timm(timm_format.write_timm(network(), SIZE), heads=HEADS).fit(network("mlp", 4))
    with pytest.raises(ValueError, match=r"it has 4 heads and the model 3: set model\.heads=4"):
        timm_format.read_timm(timm_format.write_timm(network(), SIZE), heads=4).fit(network())
    with pytest.raises(ValueError, match="how many heads"):
        timm_format.read_timm(timm_format.write_timm(network(), SIZE)).settings()


def test_what_is_not_taken_as_it_stands_is_said() -> None:
    _, said = timm_format.read_timm(timm_format.write_timm(network(), SIZE)).fit(network(position_offset=0.1))
    assert len(said) == 3
    assert (
        "how many heads" in said[0]
        and "timm keeps no mask token" in said[1]
        and "position_offset=0.1, where timm has True, 0.0" in said[2]
    )
    _, silent = dinov2.read_dinov2(dinov2.write_dinov2(network("mlp", 4))).fit(network("mlp", 4))
    assert len(silent) == 1 and "heads" in silent[0]


@pytest.mark.parametrize("spoilt", [torch.int8, torch.float8_e4m3fn, "sparse", "meta"])
def test_weights_that_are_no_ordinary_floats_are_named(spoilt: torch.dtype | str) -> None:
    weights = dinov2.write_dinov2(network())
    name, tensor = "norm.weight", weights["norm.weight"]
    weights[name] = (
        tensor.to_sparse() if spoilt == "sparse" else tensor.to("meta") if spoilt == "meta" else tensor.to(spoilt)
    )
    with pytest.raises(ValueError, match=r"^norm\.weight is of .* save the weights as ordinary floats"):
        checkpoint_file.read_checkpoint_file({0: 1, "model": weights, None: "x"})


def test_a_dictionary_that_holds_itself_is_read_once() -> None:
    held: dict = {"cls": torch.zeros(1)}
    held["again"] = held
    with pytest.raises(ValueError, match="no vision transformer is in it"):
        checkpoint_file.read_checkpoint_file(held)
