"""DINOv3's encoder against facebookresearch/dinov3: every token of two crop sizes and an oblong image, every gradient."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.formats.dinov3 import read_dinov3, write_dinov3
from models.rotary import periods
from models.vit import Tokens, VisionTransformer


@pytest.fixture(params=["plain", "untied"])
def golden(request: pytest.FixtureRequest, goldens: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(goldens / f"dinov3_encoder_{request.param}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def encoder(meta: dict[str, str], tensors: dict[str, Tensor]) -> VisionTransformer:
    """The network that the weights describe, with them, loaded strictly."""
    published = read_dinov3({k.removeprefix("weights."): t for k, t in tensors.items() if k.startswith("weights.")})
    assert published.heads == int(meta["heads"]) and not published.said
    published.norm_epsilon = 1e-5 if meta.get("norm_layer") == "layernormbf16" else 1e-6
    settings = published.settings()
    assert settings["own_cls_norm"] == settings["own_local_cls_norm"] == (meta.get("mask_k_bias") == "True")
    assert settings["qkv_bias"] == ("no_key" if meta.get("mask_k_bias") else "all")
    vit = VisionTransformer(**settings)
    weights, _ = published.fit(vit)
    vit.load_state_dict(weights, strict=True)
    return vit


def compare(found: Tokens, tensors: dict[str, Tensor], where: str, vit: VisionTransformer) -> None:
    for name, tokens in (("cls", found.cls), ("storage", found.registers), ("patches", found.patches)):
        if (expected := tensors.get(f"{where}.{name}")) is not None:
            torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=2e-5, msg=lambda m: f"{where}.{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_token_is_the_references(golden: tuple[dict[str, str], dict[str, Tensor]], mode: str) -> None:
    meta, tensors = golden
    vit = encoder(meta, tensors).train(mode == "train")
    last: list[Tensor] = []
    vit.blocks[-1].register_forward_hook(lambda _, inputs, result: last.append(result))
    with torch.no_grad():
        wide, narrow = vit([tensors["global"], tensors["local"]], [tensors["masks"], None])
        compare(wide, tensors, f"{mode}.global", vit)
        compare(narrow, tensors, f"{mode}.local", vit)
        prenorm = torch.cat([tensors[f"{mode}.{which}.prenorm"].flatten(0, 1) for which in ("global", "local")])
        torch.testing.assert_close(last[0], prenorm, atol=2e-5, rtol=2e-5)
        compare(vit.eval()([tensors["oblong"]])[0], tensors, "eval.oblong", vit)


def test_every_gradient_is_the_references(golden: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    meta, tensors = golden
    vit = encoder(meta, tensors).train()
    found = vit([tensors["global"], tensors["local"]], [tensors["masks"], None])
    loss = sum(part.cls.square().mean() + 0.01 * part.registers.sum() + part.patches.pow(3).mean() for part in found)
    loss.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(loss.detach(), tensors["loss"], atol=1e-5, rtol=1e-5)
    # A network that holds the gradients for its weights says them under the reference's names.
    with torch.no_grad():
        for parameter in vit.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    written = write_dinov3(vit)
    expected = {key.removeprefix("grad."): t for key, t in tensors.items() if key.startswith("grad.")}
    assert {name for name in written if not name.endswith(("periods", "bias_mask"))} == expected.keys()
    for name, gradient in expected.items():
        assert (written[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-8), name


def test_what_is_read_is_written_again(golden: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    meta, tensors = golden
    written = write_dinov3(encoder(meta, tensors))
    theirs = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    assert written.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith("qkv.bias") and f"{name}_mask" in theirs:
            tensor = tensor * theirs[f"{name}_mask"]
        torch.testing.assert_close(written[name], tensor, atol=0, rtol=1e-6 if name.endswith("periods") else 0)
    assert torch.allclose(periods(16), theirs["rope_embed.periods"])
