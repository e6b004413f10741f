"""The bare operator against torchscale's DilatedAttention: outputs and gradients in float64."""

from pathlib import Path

import torch
from safetensors import safe_open

from models.dilated_attention import dilated_attention


def test_compatible_operator_equals_the_reference(goldens: Path):
    with safe_open(goldens / "dilated_attention_operator.safetensors", "pt") as file:
        cases = file.metadata()
        assert cases
        for name, schedule in cases.items():
            segments, ratios = ([int(number) for number in part.split(",")] for part in schedule.split()[1::2])
            q, k, v = (file.get_tensor(f"{name}.{x}").requires_grad_() for x in "qkv")
            out = dilated_attention(q, k, v, [len(q)], segments, ratios, compatible=True)
            torch.testing.assert_close(out, file.get_tensor(f"{name}.out"), atol=1e-12, rtol=0)
            gradients = torch.autograd.grad(out, (q, k, v), file.get_tensor(f"{name}.cotangent"))
            for x, gradient in zip("qkv", gradients, strict=True):
                torch.testing.assert_close(gradient, file.get_tensor(f"{name}.grad_{x}"), atol=1e-12, rtol=0)
