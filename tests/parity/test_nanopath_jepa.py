"""JEPA's predictor and loss against MedARC-AI/nanopath: prediction, loss and every gradient, full width and narrow."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.patch_predictor import PatchPredictor
from pretrain.objectives.losses.patch_regression import normed_tokens, patch_regression
from pretrain.objectives.tile_batch import TileBatch

NAMES = {"proj_in": "embed", "blocks": "layers", "norm": "norm", "proj": "head"}


def ours(name: str) -> str:
    """A name of the reference → the predictor's."""
    first, dot, rest = name.partition(".")
    return f"{NAMES[first]}{dot}{rest}"


@pytest.fixture(params=["full", "narrow"])
def golden(request: pytest.FixtureRequest, goldens: Path) -> dict[str, Tensor]:
    prefix = f"{request.param}."
    with safe_open(goldens / "nanopath_jepa.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shared = {name: tensors[name] for name in ("masks", "student_patches", "teacher_patches")}
    return shared | {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("masked_alone", [True, False])
def test_prediction_loss_and_every_gradient_equal_the_reference(golden: dict[str, Tensor], masked_alone: bool) -> None:
    width = len(golden["weights.norm.weight"])
    predictor = PatchPredictor(encoder_width=48, width=width, depth=2, heads=6)
    weights = {
        ours(name.removeprefix("weights.")): value for name, value in golden.items() if name.startswith("weights.")
    }
    predictor.load_state_dict(weights, strict=True)
    patches = golden["student_patches"].clone().requires_grad_()
    batch = TileBatch([(torch.empty(6, 3, 1, 1), 2)], golden["masks"].unflatten(1, (4, 4)))
    if masked_alone:
        predicted = predictor(patches, batch.masked)
    else:
        whole = predictor(patches)
        torch.testing.assert_close(whole, golden["prediction"], atol=1e-5, rtol=1e-5)
        predicted = whole.flatten(0, 1)[batch.masked]
    torch.testing.assert_close(predicted, golden["prediction"][golden["masks"]], atol=1e-5, rtol=1e-5)
    target = normed_tokens(golden["teacher_patches"][golden["masks"]])
    loss = patch_regression(predicted, target, batch.crop_shares, len(batch.masks))
    torch.testing.assert_close(loss, golden["loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    assert patches.grad is not None
    torch.testing.assert_close(patches.grad, golden.pop("grad.student_patches"), atol=1e-5, rtol=1e-5)
    gradients = {ours(name.removeprefix("grad.")): value for name, value in golden.items() if name.startswith("grad.")}
    for name, parameter in predictor.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
