"""Slide iBOT against MOOZY's first stage: a step's losses and every gradient, centres and teacher after it, schedules."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from data.embeddings.grid_crops import CropBatch
from pretrain.objectives.interface import Moment
from pretrain.objectives.slide_ibot import SlideIBOT
from pretrain.settings import plugins
from pretrain.settings.composition import load
from pretrain.training.optimisation import rates_at
from tests.parity.test_slide_vit import as_ours, slide_vit_as_said

MOMENT = Moment(0, 1, 0)


@pytest.fixture(scope="module")
def golden(goldens: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(goldens / "moozy_step.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def network_tensors(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A student's or teacher's tensors, or gradients, by our names: ``before.student``, ``grad.student`` and so on."""
    head = f"{prefix}_head."
    found = {f"dino_head.{key.removeprefix(head)}": value for key, value in tensors.items() if key.startswith(head)}
    return found | {f"encoder.{key}": value for key, value in as_ours(tensors, f"{prefix}_slide_encoder").items()}


def batch_of(tensors: dict[str, Tensor]) -> CropBatch:
    """Its crops view after view, each view's slides in order."""

    def packed(name: str) -> Tensor:
        wide, narrow = (tensors.get(f"batch.{kind}_{name}") for kind in ("global", "local"))
        return torch.cat([part.transpose(0, 1).flatten(0, 3) for part in (wide, narrow) if part is not None])

    sides = tensors["batch.patch_sizes"]
    views = {kind: tensors[f"batch.{kind}_crops"].shape[1:4] for kind in ("global", "local")}
    cells = {
        f"batch.{kind}_coords": tensors[f"batch.{kind}_coords"] / sides[:, None, None, None, None] for kind in views
    }
    masks = tensors["batch.global_masks"].bool()
    slides = len(sides)
    lengths = [rows * columns for count, rows, columns in views.values() for _ in range(count * slides)]
    masked = masks.transpose(0, 1).flatten().nonzero()[:, 0]
    hidden = masks.transpose(0, 1).flatten(0, 1).sum((1, 2)).tolist() + [0] * (len(lengths) - 2 * slides)
    tensors = tensors | cells
    embeddings, valid = packed("crops"), packed("valids").bool()
    return CropBatch(
        embeddings=embeddings,
        cells=packed("coords"),
        lengths=lengths,
        visible=torch.empty(0, dtype=torch.int64),
        visible_lengths=[],
        masked=masked,
        masked_lengths=hidden,
        mean=torch.zeros(1),
        std=torch.ones(1),
        positions=list(range(slides)),
        slides=[""] * slides,
        extent=0,
        global_count=2,
        local_count=views["local"][0],
        valid=valid,
        valid_lengths=[int(crop.sum()) for crop in valid.split(lengths)],
    )


def objective(golden: tuple[dict[str, str], dict[str, Tensor]], temperature: str) -> SlideIBOT:
    meta, tensors = golden
    built = SlideIBOT(
        lambda: slide_vit_as_said(meta),
        group_size=2,
        frozen_prototype_norms=True,
        prototypes=int(meta["output_dim"]),
        bottleneck=int(meta["proj_bottleneck_dim"]),
        hidden=int(meta["proj_hidden_dim"]),
        head_layers=3,
        separate_ibot_head=False,
        ibot_prototypes=1,
        ibot_bottleneck=1,
        dino_weight=1.0 if temperature == "teacher_temp" else 0.0,
        ibot_weight=1.0 if temperature == "teacher_patch_temp" else 0.0,
        spread="koleo",
        spread_weight=0.0,
        spread_concentration=5.0,
        spread_ramp=[0.0, 0.0],
        centring="centre",
        student_temperature=float(meta["student_temp"]),
        teacher_temperature=float(meta[temperature]),
        teacher_temperature_start=float(meta[temperature]),
        teacher_temperature_warmup=0,
        teacher_momentum=float(meta["ema_momentum"]),
        teacher_momentum_final=float(meta["ema_momentum"]),
    )
    built.student.load_state_dict(network_tensors(tensors, "before.student"))
    built.teacher.load_state_dict(network_tensors(tensors, "before.teacher"))
    built.dino_centre.copy_(tensors["before.center_cls"])
    built.ibot_centre.copy_(tensors["before.center_patch"])
    return built


def test_a_step_equals_the_reference_with_every_gradient_both_centres_and_the_teacher(golden):
    """Its class tokens and masked cells have temperatures of their own, which ours share: a term each, and their sum."""
    _, tensors = golden
    gradients: dict[str, Tensor] = {}
    losses = {}
    for temperature, terms in (("teacher_temp", ("dino_global", "dino_local")), ("teacher_patch_temp", ("ibot",))):
        ours = objective(golden, temperature)
        (part,) = ours.prepare([batch_of(tensors)], MOMENT)
        loss, figures = ours.loss(part, MOMENT)
        loss.backward()
        losses[temperature] = sum(figures[name] for name in terms)
        torch.testing.assert_close(losses[temperature], loss)
        for name, parameter in ours.student.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad
    for name, expected in (("class", "teacher_temp"), ("masked", "teacher_patch_temp")):
        torch.testing.assert_close(losses[expected].detach(), tensors[f"loss.{name}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(sum(losses.values()).detach(), tensors["loss.total"], atol=1e-5, rtol=0)
    theirs = network_tensors(tensors, "grad.student")
    assert theirs.pop("dino_head.last_layer.weight_g").eq(0).all()  # frozen
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = max(gradient.abs().max().item(), 1e-3)  # a bias of all keys cancels in softmax
        torch.testing.assert_close(
            gradients[name], gradient, atol=1e-4 * largest, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
    ours.after_step(MOMENT)
    torch.testing.assert_close(ours.dino_centre, tensors["after.center_cls"], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.ibot_centre, tensors["after.center_patch"], atol=1e-5, rtol=0)
    after = network_tensors(tensors, "after.teacher")
    found = ours.teacher.state_dict()
    assert after.keys() == found.keys()
    for name, value in after.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_schedules_with_the_recipes_settings_equal_the_reference(goldens: Path):
    config = load("slide", ["recipe=moozy_slide", "run=r", "data.embeddings=e"]).object()
    with torch.device("meta"):
        teaching = plugins.build(config.objective, lambda: plugins.build(config.model, 384))
    rows = json.loads((goldens / "moozy_schedules.json").read_text())["rows"]
    assert len(rows) >= 10
    for row in rows:
        moment = Moment(row["step"], config.optim.steps, 0)
        lr, weight_decay = rates_at(row["step"], config.optim, config.data.batch_size)
        found = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": teaching.teacher_momentum(moment),
            "teacher_temperature": teaching.teacher_temperature(moment),
        }
        for name, value in found.items():
            assert np.isclose(value, row[name], atol=1e-9, rtol=0), f"{name} at step {row['step']}"
