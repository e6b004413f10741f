"""The whole DINOv2 step against facebookresearch/dinov2: losses, total, every gradient, encoder outputs."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.vit import VisionTransformer
from pretrain.objectives.dinov2 import DINOv2
from pretrain.objectives.interface import Moment
from pretrain.objectives.tile_batch import TileBatch

FILES = ["dinov2_step_swiglu_sinkhorn_separate.safetensors", "dinov2_step_mlp_centering_shared.safetensors"]


def ours(name: str) -> str:
    """A DINOv2 parameter name → ours, which is timm's."""
    for theirs, mine in [
        ("backbone.", "encoder."),
        ("register_tokens", "reg_token"),
        ("mlp.w12", "mlp.fc1"),
        ("mlp.w3", "mlp.fc2"),
    ]:
        name = name.replace(theirs, mine)
    return name


@pytest.fixture(params=FILES)
def golden(request: pytest.FixtureRequest, goldens: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(goldens / request.param, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def objective(meta: dict[str, str], tensors: dict[str, Tensor]) -> DINOv2:
    swiglu = meta["ffn"].startswith("swiglu")
    hidden = tensors["student.backbone.blocks.0.mlp." + ("w3.weight" if swiglu else "fc2.weight")].shape[1]

    def encoder() -> VisionTransformer:
        return VisionTransformer(
            image_size=int(meta["global_size"]),
            patch_size=int(meta["patch"]),
            width=int(meta["dim"]),
            depth=int(meta["depth"]),
            heads=int(meta["heads"]),
            feed_forward="swiglu" if swiglu else "mlp",
            feed_forward_width=hidden,
            registers=int(meta["registers"]),
            layer_scale=1e-5 if meta["layer_scale"] == "yes" else 0.0,
            drop_path=float(meta["drop_path"]),
        )

    prototypes, bottleneck = int(meta["prototypes"]), int(meta["bottleneck"])
    model = DINOv2(
        encoder,
        group_size=int(meta["batch"]),
        prototypes=prototypes,
        bottleneck=bottleneck,
        hidden=int(meta["hidden"]),
        head_layers=sum("student.dino_head.mlp" in name and value.ndim == 2 for name, value in tensors.items()),
        separate_ibot_head=meta["separate_head"] == "True",
        frozen_prototype_norms=False,
        ibot_prototypes=prototypes,
        ibot_bottleneck=bottleneck,
        dino_weight=float(meta["dino_weight"]),
        ibot_weight=float(meta["ibot_weight"]),
        spread="koleo",
        spread_weight=float(meta["koleo_weight"]),
        spread_concentration=5.0,
        spread_ramp=[0.0, 0.0],
        centring="sinkhorn" if meta["centering"].startswith("sinkhorn") else "centre",
        student_temperature=0.1,
        teacher_temperature=float(meta["teacher_temp"]),
        teacher_temperature_start=float(meta["teacher_temp"]),
        teacher_temperature_warmup=0,
        teacher_momentum=0.99,
        teacher_momentum_final=1.0,
    )
    for side in ("student", "teacher"):
        weights = {ours(k.removeprefix(side + ".")): v for k, v in tensors.items() if k.startswith(side + ".")}
        getattr(model, side).load_state_dict(weights, strict=True)
    if "in.dino_center" in tensors:
        model.dino_centre.copy_(tensors["in.dino_center"].reshape(1, -1))
        model.ibot_centre.copy_(tensors["in.ibot_center"].reshape(1, -1))
    return model


def batch(meta: dict[str, str], tensors: dict[str, Tensor]) -> TileBatch:
    grid = int(meta["global_size"]) // int(meta["patch"])
    crops = [(tensors["in.global_crops"], 2), (tensors["in.local_crops"], int(meta["n_local"]))]
    return TileBatch(crops, tensors["in.masks"].unflatten(1, (grid, grid)))


def test_losses_total_and_every_gradient_equal_the_reference(golden: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    meta, tensors = golden
    model = objective(meta, tensors)
    total, parts = model.loss(batch(meta, tensors), Moment(step=0, steps=1, seed=0))
    total.backward()
    displayed = {
        "dino_global_crops_loss": parts["dino_global"],
        "dino_local_crops_loss": parts["dino_local"],
        "ibot_loss": parts["ibot"] / 2,  # the reference logs half of what it optimises
        "koleo_loss": parts["spread"] * float(meta["koleo_weight"]),  # mean over views, times the weight
    }
    for name, value in displayed.items():
        torch.testing.assert_close(value, tensors[f"out.{name}"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total.detach(), tensors["out.total_loss"][0], atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.student.named_parameters()}
    reference = {ours(k.removeprefix("grad.")): v for k, v in tensors.items() if k.startswith("grad.")}
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        assert gradient is not None
        worst = (gradient - reference[name]).abs().max() / reference[name].abs().max().clamp(min=1e-12)
        assert worst <= 1e-4, f"{name}: off by {worst:.1e} of its largest"


def test_encoder_outputs_on_unmasked_crops_equal_the_reference(
    golden: tuple[dict[str, str], dict[str, Tensor]],
) -> None:
    meta, tensors = golden
    encoder = objective(meta, tensors).student.encoder
    with torch.no_grad():
        wide, narrow = encoder([tensors["in.global_crops"], tensors["in.local_crops"]])
    torch.testing.assert_close(wide.cls, tensors["out.student_cls"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide.patches, tensors["out.student_patches"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(narrow.cls, tensors["out.student_local_cls"], atol=1e-5, rtol=1e-5)
    if "out.student_registers" in tensors:
        torch.testing.assert_close(wide.registers, tensors["out.student_registers"], atol=1e-5, rtol=1e-5)
