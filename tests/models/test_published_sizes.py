"""The published networks: exactly their numbers of parameters, built without memory in under a second."""

import time
import timeit
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from models.vit import VisionTransformer

SIZES = (
    "small",
    "base",
    "large",
    "huge",
    "giant",
    *(f"dinov3_{size}" for size in ("small", "base", "large", "huge_plus", "7b")),
)
MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"


def settings(name: str, **changes: object) -> dict[str, Any]:
    """A model file's settings, as the command line would change them."""
    values = yaml.safe_load((MODELS / f"{name}.yaml" if "_" in name else MODELS / f"vit_{name}.yaml").read_text())
    assert values.pop("_target_") == "models.vit.VisionTransformer"
    return values | changes


def build(name: str, **changes: object) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(**settings(name, **changes))


def parameters(vit: VisionTransformer, extra_positions: int = 0) -> int:
    """Parameters as publishers count them: without the mask token, which only pretraining uses.

    ``extra_positions``: how many more tokens have a position there than here, where the class token alone has one.
    """
    assert vit.mask_token is not None
    return (
        sum(parameter.numel() for parameter in vit.parameters()) - vit.mask_token.numel() + extra_positions * vit.width
    )


# system: model file, its changes, positions beside or instead of the class token's, published parameters
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "Prov-GigaPath": ("giant", {"patch_size": 16}, 0, 1_134_953_984),
    "OpenMidnight": ("giant", {"registers": 4}, -1, 1_134_774_272),  # timm's register models: none for the class token
    "Virchow": ("huge", {}, 0, 631_229_184),
    "Virchow2": ("huge", {"registers": 4}, 4, 631_239_424),  # one for each register, too
    "UNI": ("large", {"patch_size": 16}, 0, 303_350_784),
}


@pytest.mark.parametrize("system", PUBLISHED)
def test_a_published_encoder_has_exactly_its_published_number_of_parameters(system: str) -> None:
    name, changes, extra, published = PUBLISHED[system]
    assert parameters(build(name, **changes), extra) == published


@pytest.mark.parametrize(
    ("name", "changes", "architecture"),
    [
        ("small", {"image_size": 518}, "vit_small_patch14_dinov2"),
        ("base", {"image_size": 518}, "vit_base_patch14_dinov2"),
        ("large", {"image_size": 518}, "vit_large_patch14_dinov2"),
        ("giant", {"image_size": 518}, "vit_giant_patch14_dinov2"),
        ("small", {"image_size": 518, "registers": 4}, "vit_small_patch14_reg4_dinov2"),
        ("giant", {"image_size": 518, "registers": 4}, "vit_giant_patch14_reg4_dinov2"),
        ("small", {"patch_size": 16, "layer_scale": 0.0}, "vit_small_patch16_224"),
        ("base", {"patch_size": 8, "layer_scale": 0.0}, "vit_base_patch8_224"),
    ],
)
def test_the_model_files_have_the_shapes_of_timms_architectures(
    name: str, changes: dict[str, Any], architecture: str
) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(architecture, num_classes=0)
    ours = {k: v.shape for k, v in build(name, **changes).state_dict().items() if k != "mask_token"}
    if "reg_token" in ours:
        ours["pos_embed"] = torch.Size((1, ours["pos_embed"][1] - 1, ours["pos_embed"][2]))
    assert ours == {k: v.shape for k, v in theirs.state_dict().items()}


# timm's architecture, published parameters in millions (its README, rounded there), and what timm and transformers count.
DINOV3: dict[str, tuple[str, int, int]] = {
    "small": ("vit_small_patch16_dinov3_qkvb", 21, 21_596_160),
    "base": ("vit_base_patch16_dinov3_qkvb", 86, 85_659_648),
    "large": ("vit_large_patch16_dinov3_qkvb", 300, 303_128_576),
    "huge_plus": ("vit_huge_plus_patch16_dinov3_qkvb", 840, 840_591_360),
    "7b": ("vit_7b_patch16_dinov3", 6716, 6_716_030_976),
}


@pytest.mark.parametrize("name", DINOV3)
def test_dinov3s_encoders_have_their_published_sizes_and_timms_shapes(name: str) -> None:
    architecture, millions, exact = DINOV3[name]
    vit = build(f"dinov3_{name}")
    with torch.device("meta"):
        theirs = timm.create_model(architecture, num_classes=0)
    ours = write_timm_dinov3_shapes(vit)
    assert ours == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in ours.values()) == exact
    assert abs(exact / 1e6 / millions - 1) < 0.03


def write_timm_dinov3_shapes(vit: VisionTransformer) -> dict[str, torch.Size]:
    """Of what would be written for timm, biases of keys and norms of local crops left out, which it doesn't have."""
    shapes = {}
    for key, tensor in vit.state_dict().items():
        key = key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
        if key.endswith("qkv.bias"):
            third = torch.Size([len(tensor) // 3])
            shapes |= {key.replace("qkv.bias", f"{part}_bias"): third for part in "qv"}
        elif vit.feed_forward == "swiglu" and ".fc1." in key:
            half = torch.Size([len(tensor) // 2, *tensor.shape[1:]])
            shapes |= {key.replace(".fc1.", f".fc1_{part}."): half for part in "gx"}
        elif key != "mask_token" and "local_cls_norm" not in key:
            shapes[key] = tensor.shape
    return shapes


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_built_on_the_meta_device_in_under_a_second(name: str) -> None:
    values = settings(name)

    def build() -> VisionTransformer:
        with torch.device("meta"):
            return VisionTransformer(**values)

    # Of this thread alone, and tried three times: a busy machine may take any one of them.
    assert any(timeit.timeit(build, timer=time.thread_time, number=1) < 1 for _ in range(3))
    assert all(parameter.is_meta for parameter in build().parameters())


def test_a_model_file_names_every_setting_of_the_network() -> None:
    import inspect

    known = {p.name for p in inspect.signature(VisionTransformer).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in SIZES:
        assert settings(name).keys() == known
