"""What a run that compiles fuses beside its blocks: losses, targets and augmentation, the same numbers in few graphs."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.fused import Compile, fusing
from data.keyed import rng
from data.tiles.augment import augment_together, shift_stains
from data.tiles.augment_parameters import Colour, draw_parameters
from pretrain.objectives.interface import Moment
from tests.pretrain.objectives.tile_objectives import batch, dinov2

STEPS = 6


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.count += 1
        return graph.forward

    def compile(self) -> Compile:
        """Raises where a function doesn't become one graph."""
        torch._dynamo.reset()
        return partial(torch.compile, backend=self, fullgraph=True)


def taken(compile: Compile | None, graphs: Graphs, **settings: Any) -> tuple[list[Tensor], list[int]]:
    """Gradients of steps with other masks and another temperature each, and the graphs that there were after each."""
    objective = dinov2(teacher_temperature_warmup=STEPS, **settings)
    found, counts = [], []
    for step in range(STEPS):
        with fusing(compile):
            parts = [batch(4, seed=2 * step + part) for part in range(2)]
            moment = Moment(step, STEPS, seed=0)
            for part in objective.prepare(parts, moment):
                objective.loss(part, moment)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in objective.student.parameters() if p.grad is not None]))
        objective.zero_grad()
        counts.append(graphs.count)
    return found, counts


@pytest.mark.parametrize(("centring", "spread"), [("sinkhorn", "koleo"), ("centre", "kde"), ("sinkhorn", "sigreg")])
def test_fused_losses_have_the_same_gradients_and_no_new_graph_after_the_third_step(centring: str, spread: str) -> None:
    graphs = Graphs()
    ours, counts = taken(graphs.compile(), graphs, centring=centring, spread=spread)
    expected, _ = taken(None, graphs, centring=centring, spread=spread)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert 0 < counts[-1] <= 14 and counts[2:] == [counts[2]] * (STEPS - 2), counts


def test_fused_augmentation_is_the_same_and_makes_no_new_graph_after_three_batches() -> None:
    graphs = Graphs()
    compile, counts = graphs.compile(), []
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    for step in range(5):
        for side in (32, 16):
            draw = torch.Generator().manual_seed(step)
            images = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, generator=draw)
            rows = draw_parameters(Colour(), np.arange(8) % 3, rng(step))
            shift = 0.1 * torch.randn(8, 3, 1, 1, generator=draw)
            found = []
            for how in (compile, None):
                with fusing(how):
                    stained = shift_stains(images / 255, shift, 1 + shift)
                    found += [stained, augment_together((stained * 255).byte(), rows, 1 / std, -mean / std)]
            torch.testing.assert_close(found[0], found[2])
            torch.testing.assert_close(found[1], found[3])
        counts.append(graphs.count)
    assert 0 < counts[-1] <= 9 and counts[3:] == [counts[2]] * 2, counts


@pytest.mark.slow
def test_compiled_losses_have_the_same_gradients() -> None:
    graphs = Graphs()
    torch._dynamo.reset()
    for one, other in zip(taken(torch.compile, graphs)[0], taken(None, graphs)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-5)
