"""DINOv3's objective against facebookresearch/dinov3: losses alone, the whole step with and without Gram anchoring, its
schedules and parameter groups."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.formats.dinov3 import read_dinov3
from models.vit import VisionTransformer
from pretrain.objectives.dinov3 import DINOv3
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.cross_entropy import cross_view_entropy
from pretrain.objectives.losses.gram import GRAM_NEGATIVES, gram_distance
from pretrain.objectives.schedules import cosine_then_constant
from pretrain.objectives.tile_batch import TileBatch
from pretrain.training.optimisation import multipliers


@pytest.fixture(params=["dinov3_step", "dinov3_step_gram"])
def golden(request: pytest.FixtureRequest, goldens: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(goldens / f"{request.param}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def objective(meta: dict[str, str], tensors: dict[str, Tensor]) -> DINOv3:
    published = read_dinov3(under(tensors, "student.backbone."))
    published.norm_epsilon = 1e-5 if "norm_layer" in meta and meta["norm_layer"] == "layernormbf16" else 1e-6
    settings = published.settings() | {"qkv_bias": "no_key"}
    gram = "gram_teacher_crops" in tensors
    model = DINOv3(
        lambda: VisionTransformer(**settings),
        group_size=int(meta["tiles"]),
        prototypes=int(meta["prototypes"]),
        bottleneck=int(meta["bottleneck"]),
        hidden=int(meta["hidden"]),
        head_layers=3,
        ibot_prototypes=int(meta["ibot_prototypes"]),
        ibot_bottleneck=int(meta["ibot_bottleneck"]),
        dino_weight=1.0,
        local_weight=float(meta["local_weight"]),
        ibot_weight=1.0,
        spread="koleo",
        spread_weight=float(meta["koleo_weight"]),
        spread_concentration=5.0,
        spread_ramp=[0.0, 0.0],
        gram_weight=float(meta["gram_weight"]),
        gram_size=96 if gram else None,
        gram_every=10,
        gram_refreshes=3,
        gram_negatives="kept",
        student_temperature=float(meta["student_temperature"]),
        teacher_temperature=float(meta["teacher_temperature"]),
        teacher_temperature_start=float(meta["teacher_temperature"]),
        teacher_temperature_warmup=0,
        teacher_momentum=0.99,
        teacher_momentum_final=1.0,
    )
    for side in ("student", "teacher"):
        network: Any = getattr(model, side)
        network.encoder.load_state_dict(read_dinov3(under(tensors, f"{side}.backbone.")).weights, strict=True)
        for head in ("dino_head", "ibot_head"):
            getattr(network, head).load_state_dict(under(tensors, f"{side}.{head}."), strict=True)
    if gram:
        assert model.gram_teacher is not None
        weights = read_dinov3(under(tensors, "gram_teacher.backbone.")).weights
        model.gram_teacher.load_state_dict(weights, strict=True)
    return model


def batch(tensors: dict[str, Tensor]) -> TileBatch:
    crops = [(tensors["global_crops"], 2), (tensors["local_crops"], 3)]
    if "gram_teacher_crops" in tensors:
        crops.append((tensors["gram_teacher_crops"], 2))
    return TileBatch(crops, tensors["masks"].unflatten(1, (4, 4)))


def test_losses_total_and_every_gradient_equal_the_reference(golden: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    meta, tensors = golden
    model = objective(meta, tensors)
    model.teacher.eval()
    total, parts = model.loss(batch(tensors), Moment(step=0, steps=1, seed=0))
    total.backward()
    shares = {"dino_global": 2 / (2 + 2 * 3), "dino_local": 6 / (2 + 2 * 3)}
    shown = {
        "dino_global_crops_loss": parts["dino_global"] / shares["dino_global"],
        "dino_local_crops_loss": parts["dino_local"] / shares["dino_local"],
        "ibot_loss": parts["ibot"],
        "koleo_loss": parts["spread"],
    } | ({"gram_loss": parts["gram"]} if "gram" in parts else {})
    for name, value in shown.items():
        torch.testing.assert_close(
            value, tensors[f"loss.{name}"], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(total.detach(), tensors["total_loss"], atol=1e-5, rtol=1e-5)
    reference = under(tensors, "grad.")
    expected = read_dinov3(
        under(reference, "backbone.") | {"rope_embed.periods": tensors["student.backbone.rope_embed.periods"]}
    ).weights
    expected = {f"encoder.{name}": tensor for name, tensor in expected.items()}
    expected |= {name: tensor for name, tensor in reference.items() if not name.startswith("backbone.")}
    gradients = dict(model.student.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, parameter in gradients.items():
        assert parameter.grad is not None, name
        worst = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-12)
        assert worst <= 1e-4 or expected[name].abs().max() < 1e-9, f"{name}: off by {worst:.1e} of its largest"
    if model.gram_teacher is not None:
        assert all(parameter.grad is None for parameter in model.gram_teacher.parameters())


def test_gram_and_class_token_losses_equal_the_reference(goldens: Path) -> None:
    golden = load_file(goldens / "dinov3_losses.safetensors")
    names = {"kept": "all", "teachers_dropped": "no_teacher_negatives", "dropped": "no_negatives"}
    for level, negatives in itertools.product(("image", "batch"), GRAM_NEGATIVES):
        expected = f"gram.{level}.{names[negatives]}"
        student = golden["student_patches"].clone().requires_grad_()
        pair = (student, golden["teacher_patches"])
        found = gram_distance(*(x if level == "image" else x.flatten(0, 1).unsqueeze(0) for x in pair), negatives)
        found.backward()
        torch.testing.assert_close(found.detach(), golden[expected], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(student.grad, golden[f"{expected}.grad"], atol=1e-6, rtol=1e-5)
    scores = [golden["student_global_scores"], golden["student_local_scores"]]
    of_globals, of_locals = cross_view_entropy(scores, golden["targets"], 0.1)
    terms = 2 + 2 * 4  # pairs of another view, and those of local views
    torch.testing.assert_close(of_globals * terms / 2, golden["dino.global"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(of_locals * terms / 8, golden["dino.local"], atol=1e-6, rtol=1e-6)


def test_every_schedule_equals_the_reference(goldens: Path) -> None:
    for name, schedule in json.loads((goldens / "dinov3_schedules.json").read_text()).items():
        rest = schedule["total_iterations"] - schedule["warmup_iterations"]
        for step, expected in zip(schedule["at"], schedule["values"], strict=True):
            found = cosine_then_constant(
                step,
                peak=schedule["peak"],
                final=schedule["end"],
                warmup=schedule["warmup_iterations"],
                start=schedule["start"],
                cosine=0 if name == "warmup_constant" else schedule.get("cosine_iterations", rest),
            )
            assert abs(found - expected) <= 1e-9, f"{name} at step {step}"


def test_every_multiplier_equals_the_reference_exactly(goldens: Path) -> None:
    golden = json.loads((goldens / "dinov3_param_groups.json").read_text())
    depth = len({name.split(".")[1] for name in golden["backbone"] if name.startswith("blocks.")})
    for part, groups in golden.items():
        for theirs, expected in groups.items():
            name = theirs.replace("storage_tokens", "reg_token")
            backbone = part == "backbone"
            dimensions = 3 if "token" in name else 2 if name.endswith("weight") and "norm" not in name else 1
            found = multipliers(name, dimensions, depth if backbone else 0, 0.9 if backbone else 1.0, 0.2)
            assert (found.lr, found.weight_decay, found.last_layer) == (
                expected["lr_multiplier"],
                expected["wd_multiplier"],
                expected["is_last_layer"],
            ), theirs
