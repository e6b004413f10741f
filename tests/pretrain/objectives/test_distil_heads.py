"""Distillation by heads: a student learns the prototypes that a frozen teacher of another width and patch size gives
tiles and patches to."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.fault import Fault
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.assignment import sinkhorn_knopp
from pretrain.objectives.losses.spread import koleo
from pretrain.training.gradients import gradients
from tests.pretrain.objectives.tile_objectives import (
    GLOBAL,
    PATCH,
    batch,
    distil_heads,
    encoder,
    teacher_file,
    teacher_run,
    unfilled_dinov2,
    unfilled_distil_heads,
)

START = Moment(0, 10, 0)


def test_heads_are_as_large_as_the_teachers_and_start_anew() -> None:
    model = distil_heads()
    for student, given in (
        (model.student.dino_head, model.given.dino_head),
        (model.student.ibot_head, model.given.ibot_head),
    ):
        sizes = {name: tensor.shape for name, tensor in given.state_dict().items()}
        assert student.state_dict().keys() == sizes.keys()
        assert [name for name, tensor in student.named_parameters() if tensor.shape != sizes[name]] == ["mlp.0.weight"]
        assert isinstance(student.last_layer, nn.Linear)  # DINOv3's prototypes have no norms of their own
    assert model.prototype_counts() == {"dino": 24, "ibot": 20}
    of_dinov2 = distil_heads(teacher=teacher_run("dinov2", separate_ibot_head=False, prototypes=12))
    assert of_dinov2.student.ibot_head is None and of_dinov2.prototype_counts() == {"dino": 12, "ibot": 12}
    assert of_dinov2.student.dino_head.last_layer.weight_g.shape == (12, 1)


def test_terms_are_cross_entropies_with_the_given_teachers_assignments() -> None:
    model, seen = distil_heads(dino_weight=2.0, ibot_weight=3.0), batch(2)
    loss, figures = model.loss(seen, START)
    images, grid = seen.crops[0][0], GLOBAL // PATCH
    larger = F.interpolate(images, (6 * grid, 6 * grid), mode="bicubic", antialias=True)
    (theirs,) = model.given.encoder([larger])
    ours = model.student.encoder([crops for crops, _ in seen.crops])  # nothing masked

    def assigned(scores: Tensor) -> Tensor:
        return sinkhorn_knopp(scores, 0.07)

    def entropy(scores: Tensor, target: Tensor) -> Tensor:
        return -(target * F.log_softmax(scores / 0.1, dim=-1)).sum(-1)

    targets = assigned(model.given.dino_head(theirs.cls)).unflatten(0, (2, 2))
    large, small = (model.student.dino_head(tokens.cls).unflatten(0, (-1, 2)) for tokens in ours)
    crossed = [entropy(large[v], targets[1 - v]) for v in range(2)]
    local = [entropy(small[s], targets[v]) for s in range(3) for v in range(2)]
    pairs = len(crossed) + len(local)
    torch.testing.assert_close(figures["dino_global"], torch.stack(crossed).mean(1).sum() / pairs)
    torch.testing.assert_close(figures["dino_local"], torch.stack(local).mean(1).sum() / pairs)

    where = seen.masks.flatten(1)
    aims = assigned(model.given.ibot_head(theirs.patches[where]))
    apart = entropy(model.student.ibot_head(ours[0].patches[where]), aims)
    of_crops = apart.split(where.sum(1).tolist())
    torch.testing.assert_close(figures["ibot"], sum(one.mean() for one in of_crops if len(one)) / len(where))
    expected = 2 * (figures["dino_global"] + figures["dino_local"]) + 3 * figures["ibot"]
    torch.testing.assert_close(loss, expected + 0.1 * 2 * koleo(ours[0].cls, 2))


def test_a_student_that_is_the_teacher_has_dinov2s_loss_where_nothing_is_masked() -> None:
    as_large = encoder(width=24, heads=3)
    model = unfilled_distil_heads(as_large, teacher=teacher_run("dinov2", PATCH))
    model.start()
    own, seen = unfilled_dinov2(as_large), batch(3)
    for network in (model.student, own.student, own.teacher):
        network.load_state_dict(model.given.state_dict())
    forward = own.student.encoder.forward
    own.student.encoder.forward = lambda crops, masks, *more, **named: forward(crops, None, *more, **named)
    (loss, figures), (theirs, of_theirs) = model.loss(seen, START), own.loss(seen, START)
    torch.testing.assert_close(loss, theirs)
    for name in ("dino_global", "dino_local", "ibot", "spread"):
        torch.testing.assert_close(figures[name], of_theirs[name])


def test_a_student_comes_nearer_to_its_teacher_which_stays_as_it_is() -> None:
    model = distil_heads(teacher_momentum=0.9, teacher_momentum_final=0.9, spread_weight=0.0)
    before = {name: tensor.clone() for name, tensor in model.given.state_dict().items()}
    seen = batch(16)

    def distance(network: nn.Module) -> float:
        """Nats above the entropy of targets, of class tokens."""
        prepared = model.prepare([seen], START)[0]
        targets = prepared.targets["dino"]()  # type: ignore[index]
        with torch.no_grad():
            scores = network.dino_head(network.encoder([seen.crops[0][0]])[0].cls)  # type: ignore[operator]
        return float((targets * (targets.log() - F.log_softmax(scores / 0.1, dim=-1))).sum(-1).mean())

    first = distance(model.teacher)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(40):
        moment = Moment(step, 40, 0)
        optimiser.zero_grad()
        gradients(model, [(seen, 0)], moment, lambda loss: loss.backward())
        optimiser.step()
        model.after_step(moment)
    assert distance(model.teacher) < 0.5 * first, (first, distance(model.teacher))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.given.state_dict().items())
    assert all(p.grad is None for network in model.frozen().values() for p in network.parameters())


def test_checkpoints_hold_student_and_moving_average_and_not_the_given_teacher() -> None:
    model = distil_heads()
    state = model.state_dict()
    assert {name.partition(".")[0] for name in state} == {"student", "teacher", "dino_centre", "ibot_centre"}
    model.load_state_dict(state)
    assert [len(digest) for digest in model.rests_on().values()] == [16]


@pytest.mark.parametrize("of", ["file", "timm", "dino"])
def test_a_teacher_without_heads_is_told_and_what_learns_from_it(of: str) -> None:
    named = {
        "file": teacher_file,
        "timm": lambda: "vit_small_patch14_dinov2",
        "dino": lambda: teacher_run("dino"),
    }
    source = named[of]()
    with pytest.raises(Fault, match=rf"objective\.teacher={source} names no run with heads .* by objective=distil\."):
        unfilled_distil_heads(encoder(), teacher=source)


def test_a_teacher_that_is_gone_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=rf"objective\.teacher={tmp_path}/run: there is no folder .*/run; give the run"):
        unfilled_distil_heads(encoder(), teacher=f"{tmp_path}/run")


def test_a_teacher_that_is_not_named_is_asked_for() -> None:
    with pytest.raises(Fault, match=r"objective\.teacher= names nothing: give the run whose heads"):
        unfilled_distil_heads(encoder(), teacher=None)


def test_a_student_may_be_the_next_ones_teacher() -> None:
    model = distil_heads(teacher=teacher_run("distil_heads"))
    assert model.prototype_counts() == {"dino": 24, "ibot": 20}
    assert torch.isfinite(model.loss(batch(2), START)[0])


def test_a_teacher_whose_weights_are_of_another_network_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(teacher_run(), tmp_path / "run"))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("depth: 2", "depth: 1"))
    with pytest.raises(
        Fault, match=r"run doesn't fit the model in its config\.yaml: one of them lacks encoder\.blocks\.1"
    ):
        distil_heads(teacher=str(copy))
