"""DINO: its loss written out pair by pair, what is trained, and what the teacher and the centre do."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.objectives.interface import Moment
from tests.pretrain.objectives.tile_objectives import batch, dino, dinov2


def test_the_loss_is_the_mean_over_all_crossed_pairs_of_views() -> None:
    objective, whole = dino(), batch(4)
    objective.dino_centre.normal_(generator=torch.Generator().manual_seed(1))
    loss, parts = objective.loss(whole, Moment(0, 10, 0))
    (wide, _), (narrow, _) = whole.crops
    with torch.no_grad():
        teacher = objective.teacher.dino_head(objective.teacher.encoder([wide])[0].cls).chunk(2)
        targets = [F.softmax((scores - objective.dino_centre) / 0.07, dim=-1) for scores in teacher]
        student = [
            scores
            for images, views in ((wide, 2), (narrow, 3))
            for scores in objective.student.dino_head(objective.student.encoder([images])[0].cls).chunk(views)
        ]
        pairs = [F.cross_entropy(student[s] / 0.1, targets[t]) for t in range(2) for s in range(5) if s != t]
    assert len(pairs) == 8
    torch.testing.assert_close(loss.detach(), torch.stack(pairs).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((parts["dino_global"] + parts["dino_local"]).detach(), loss.detach())


def test_dino_is_dinov2_without_patches_and_spread() -> None:
    shared = {"centring": "sinkhorn", "separate_ibot_head": False}
    whole, moment = batch(4), Moment(3, 10, 0)
    one, two = dino("sinkhorn"), dinov2(**shared, ibot_weight=0.0, spread_weight=0.0)
    whole.masks.zero_()
    torch.testing.assert_close(one.loss(whole, moment)[0], two.loss(whole, moment)[0])


def test_the_teacher_predicts_no_gradient_and_prototype_norms_stay_frozen() -> None:
    objective = dino()
    objective.loss(batch(4), Moment(0, 10, 0))[0].backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    still = [name for name, parameter in objective.student.named_parameters() if parameter.grad is None]
    assert sorted(still) == ["dino_head.last_layer.weight_g", "encoder.mask_token"]
    moving = dino(frozen_prototype_norms=False)
    moving.loss(batch(4), Moment(0, 10, 0))[0].backward()
    assert moving.student.dino_head.last_layer.weight_g.grad is not None


def test_teacher_and_centre_follow_after_a_step() -> None:
    objective, whole, moment = dino(), batch(4), Moment(0, 10, 0)
    with torch.no_grad():
        scores = objective.teacher.dino_head(objective.teacher.encoder([whole.crops[0][0]])[0].cls)
        before = objective.teacher.encoder.cls_token.clone()
        objective.loss(whole, moment)
        objective.student.encoder.cls_token.add_(1.0)
        objective.after_step(moment)
    torch.testing.assert_close(objective.dino_centre, 0.1 * scores.mean(0, keepdim=True), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(objective.teacher.encoder.cls_token, before + (1 - 0.9), atol=1e-6, rtol=1e-5)


def test_a_constant_teacher_temperature_and_a_warm_up() -> None:
    constant = dino(teacher_temperature=0.04, teacher_temperature_start=0.04, teacher_temperature_warmup=0)
    assert [constant.teacher_temperature(Moment(step, 100, 0)) for step in (0, 1, 50)] == [0.04] * 3
    rising = dino(teacher_temperature_warmup=11)
    assert rising.teacher_temperature(Moment(0, 100, 0)) == pytest.approx(0.04)
    assert rising.teacher_temperature(Moment(5, 100, 0)) == pytest.approx(0.055)
    assert rising.teacher_temperature(Moment(11, 100, 0)) == pytest.approx(0.07)


def test_it_works_without_local_crops_and_refuses_a_single_view() -> None:
    loss, parts = dino().loss(batch(4, views=(2, 0)), Moment(0, 10, 0))
    assert loss.isfinite() and parts["dino_local"] == 0
    with pytest.raises(ValueError, match="global_count=2"):
        dino().check_views(1, 0)


def test_a_few_steps_on_one_batch_lower_its_loss() -> None:
    objective, whole = dino("sinkhorn", teacher_momentum=1.0), batch(8)
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss, _ = objective.loss(whole, Moment(0, 10, 0))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
