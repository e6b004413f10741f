"""DINOv2's own losses, one by one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.objectives.losses.assignment import centred_softmax, sinkhorn_knopp
from pretrain.objectives.losses.cross_entropy import dino_cross_entropy, masked_cross_entropy
from pretrain.objectives.losses.spread import koleo

STUDENT_TEMPERATURE = 0.1  # the reference's default


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, Tensor]:
    return load_file(goldens / "dinov2_losses.safetensors")


def outputs(golden: dict[str, Tensor], prefix: str) -> list[tuple[str, float, Tensor]]:
    """(name, temperature, value) of every output under a prefix: the temperature is written in its name."""
    found = [
        (name, float(name.partition("out_temp")[2].partition("_")[0]), value)
        for name, value in golden.items()
        if name.startswith(f"{prefix}.out_temp")
    ]
    assert found, f"no output {prefix}.out_temp… in the file"
    return found


def test_dino_cross_entropy(golden: dict[str, Tensor]) -> None:
    student, teacher = golden["dino.student"], golden["dino.teacher"]
    pairs = len(student) * len(teacher)  # the reference sums over pairs of views
    torch.testing.assert_close(
        dino_cross_entropy(student, teacher, STUDENT_TEMPERATURE) * pairs, golden["dino.loss"][0], atol=1e-6, rtol=1e-6
    )


def test_masked_cross_entropy(golden: dict[str, Tensor]) -> None:
    masks = golden["ibot.masks"]
    weight = (1 / masks.sum(1).clamp(min=1)).unsqueeze(1).expand_as(masks)[masks]
    found = masked_cross_entropy(
        golden["ibot.student"], golden["ibot.teacher"], weight, len(masks), STUDENT_TEMPERATURE
    )
    torch.testing.assert_close(found, golden["ibot.loss"][0], atol=1e-6, rtol=1e-6)


def test_centred_softmax(golden: dict[str, Tensor]) -> None:
    for _, temperature, expected in outputs(golden, "softmax_center"):
        found = centred_softmax(golden["softmax_center.logits"], golden["softmax_center.center"], temperature)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_sinkhorn_equals_the_reference_where_that_is_finite_and_is_finite_everywhere(golden: dict[str, Tensor]) -> None:
    for _, temperature, expected in outputs(golden, "sinkhorn"):
        found = sinkhorn_knopp(golden["sinkhorn.logits"], temperature)
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(1), torch.ones(len(found)), atol=1e-5, rtol=0)
        finite = expected.isfinite()
        torch.testing.assert_close(found[finite], expected[finite], atol=1e-6, rtol=1e-5)


def test_sinkhorn_equals_the_reference_in_double_precision_where_float32_overflowed(golden: dict[str, Tensor]) -> None:
    for _, temperature, _ in outputs(golden, "sinkhorn"):
        q = torch.exp(golden["sinkhorn.logits"].double() / temperature)
        for _ in range(3):
            q = q / q.sum(0, keepdim=True)
            q = q / q.sum(1, keepdim=True)
        torch.testing.assert_close(
            sinkhorn_knopp(golden["sinkhorn.logits"], temperature), q.float(), atol=1e-5, rtol=1e-4
        )


def test_sinkhorn_on_masked_patches(golden: dict[str, Tensor]) -> None:
    for name, temperature, expected in outputs(golden, "ibot_sinkhorn"):
        rows = int(name.rpartition("first")[2])  # of the padded rows, those that are masked patches
        assert rows == len(expected)
        found = sinkhorn_knopp(golden["ibot_sinkhorn.logits"][:rows], temperature)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_koleo(golden: dict[str, Tensor]) -> None:
    x = golden["koleo.x"]
    torch.testing.assert_close(koleo(x, len(x)), golden["koleo.loss"][0], atol=1e-6, rtol=1e-6)
