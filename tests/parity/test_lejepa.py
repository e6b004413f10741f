"""SIGReg against rbalestr-lab/lejepa: the statistic of every slice, the mean, and the gradient."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.objectives.losses.sigreg import characteristic_means, epps_pulley


@pytest.mark.parametrize(("knots", "last"), [(17, 3.0), (21, 5.0)])
def test_sigreg_is_that_of_the_reference(goldens: Path, knots: int, last: float) -> None:
    golden = load_file(goldens / "lejepa_sigreg.safetensors")
    z = golden["embeddings"].requires_grad_()
    found = epps_pulley(characteristic_means(z, golden["directions"], knots, last), z.shape[1], last)
    found.mean().backward()
    torch.testing.assert_close(found, golden[f"knots{knots}.statistic"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean(), golden[f"knots{knots}.mean"], rtol=1e-5, atol=0)
    torch.testing.assert_close(z.grad, golden[f"knots{knots}.grad"], rtol=0, atol=1e-5 * float(z.grad.abs().max()))
