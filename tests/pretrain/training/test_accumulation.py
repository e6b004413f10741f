"""Micro-batches: the same step as the large batch, to the last digits of float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pretrain.objectives.interface import Moment, Objective
from pretrain.objectives.losses.assignment import centred_softmax, sinkhorn_centre, sinkhorn_knopp
from pretrain.training.gradients import gradients
from tests.pretrain.objectives.tile_objectives import (
    batch,
    dino,
    dinov2,
    distil,
    distil_heads,
    jepa,
    lejepa,
    mae,
    part,
)

TILES = 8
MAKERS: dict[str, tuple[Callable[[], Objective], tuple[int, int]]] = {
    "dinov2 sinkhorn": (lambda: dinov2("sinkhorn", drop_path=0.4), (2, 3)),
    "dinov2 centre": (lambda: dinov2("centre", drop_path=0.4), (2, 3)),
    "dinov2 kde, shared head": (lambda: dinov2("sinkhorn", spread="kde", separate_ibot_head=False), (2, 3)),
    "dino centre": (lambda: dino("centre", drop_path=0.4), (2, 3)),
    "dino sinkhorn, no local crops": (lambda: dino("sinkhorn"), (2, 0)),
    "jepa": (lambda: jepa(drop_path=0.4), (2, 3)),
    "mae": (mae, (1, 0)),
    "dinov2 sigreg": (lambda: dinov2("sinkhorn", spread="sigreg"), (2, 3)),
    "lejepa": (lejepa, (2, 3)),
    "distil": (lambda: distil(drop_path=0.4, distance="smooth_l1"), (2, 3)),
    "distil_heads": (lambda: distil_heads(drop_path=0.4), (2, 3)),
}


def after_steps(
    make: Callable[[], Objective], views: tuple[int, int], tiles_each: int, steps: int = 3
) -> tuple[dict[str, Tensor], list[float]]:
    """All weights, teacher and centres included, and the losses of some whole steps in micro-batches of
    ``tiles_each``."""
    objective, losses = make().double(), []
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        whole = batch(TILES, views, seed=step, dtype=torch.float64)
        parts = [(part(whole, first, first + tiles_each), first) for first in range(0, TILES, tiles_each)]
        moment = Moment(step, steps, seed=5)
        optimiser.zero_grad()
        figures = gradients(objective, parts, moment, lambda loss: loss.backward())
        optimiser.step()
        objective.after_step(moment)
        losses.append(float(figures["loss"]))
    return {name: value.clone() for name, value in objective.state_dict().items()}, losses


@pytest.mark.parametrize("name", MAKERS)
def test_micro_batches_take_the_same_steps_as_the_whole_batch(name: str) -> None:
    whole, losses = after_steps(*MAKERS[name], tiles_each=TILES)
    for tiles_each in (2, 4):
        pieces, same = after_steps(*MAKERS[name], tiles_each=tiles_each)
        assert same == pytest.approx(losses, rel=1e-6)  # figures are logged in float32
        for key, value in whole.items():
            torch.testing.assert_close(
                pieces[key], value, atol=1e-10, rtol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_sinkhorn_in_each_micro_batch_by_itself_would_be_another_step() -> None:
    """The check above can fail: without `prepare` over all micro-batches the targets differ."""
    objective = dinov2("sinkhorn").double()
    whole = batch(TILES, dtype=torch.float64)
    moment = Moment(0, 1, seed=5)
    gradients(objective, [(whole, 0)], moment, lambda loss: loss.backward())
    expected = objective.student.encoder.patch_embed.proj.weight.grad.clone()
    objective.zero_grad()
    for first in range(0, TILES, 2):
        (objective.loss(part(whole, first, first + 2), Moment(0, 1, 5, first))[0] / 4).backward()
    assert (objective.student.encoder.patch_embed.proj.weight.grad - expected).abs().max() > 1e-3 * expected.abs().max()


def test_sinkhorn_of_the_parts_is_sinkhorn_of_the_whole_also_with_an_empty_part() -> None:
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [logits[:4], logits[4:4], logits[4:]]
    centre = sinkhorn_centre(lambda: parts, 0.07)
    found = torch.cat([centred_softmax(part, centre, 0.07) for part in parts])
    torch.testing.assert_close(found, sinkhorn_knopp(logits, 0.07), atol=1e-12, rtol=1e-12)
    q = torch.exp(logits / 0.07)
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    torch.testing.assert_close(found, q, atol=1e-12, rtol=1e-10)


def test_a_skipped_step_moves_no_centre() -> None:
    objective = dinov2("centre")
    before = objective.dino_centre.clone()
    gradients(objective, [(batch(4), 0)], Moment(0, 2, 0), lambda loss: None)
    objective.after_skip()
    objective.after_step(Moment(1, 2, 0))
    assert torch.equal(objective.dino_centre, before)
    gradients(objective, [(batch(4), 0)], Moment(1, 2, 0), lambda loss: None)
    objective.after_step(Moment(1, 2, 0))
    assert not torch.equal(objective.dino_centre, before)
