"""DINOv3's objective beside the goldens: when the Gram teacher is refreshed, what its views show, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from data.fault import Fault
from data.keyed import rng
from data.tiles.augment_parameters import GREY, JITTER, PLAIN, SIGMA, SOLARISE, STAIN, Colour, draw_parameters
from data.tiles.crops import CropSizes, FurtherViews, cut
from pretrain.objectives.dense_figures import map_cosines
from pretrain.objectives.dinov3 import DINOv3
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.gram import gram_distance, on_grid
from pretrain.settings.composition import load
from pretrain.training.optimisation import rates_at
from pretrain.training.tile_settings import checked_views
from tests.pretrain.objectives import tile_objectives
from tests.pretrain.objectives.tile_objectives import GRAM, filled, unfilled_dinov3


def objective(**settings: object) -> DINOv3:
    return filled(unfilled_dinov3(tile_objectives.encoder(position_embedding="rope"), **settings))  # type: ignore[return-value]


def test_the_gram_teacher_is_the_teacher_of_every_third_step_twice_and_no_more() -> None:
    ours = objective()
    batch, refreshed = tile_objectives.batch(4, larger=True), []
    optimiser = torch.optim.SGD(ours.student.parameters(), lr=0.1)
    assert ours.gram_teacher is not None
    for step in range(10):
        moment = Moment(step, 10, 0)
        before = ours.gram_teacher.cls_token.clone()
        (prepared,) = ours.prepare([batch], moment)
        if not torch.equal(before, ours.gram_teacher.cls_token):
            refreshed.append(step)
            for mine, theirs in zip(ours.gram_teacher.parameters(), ours.teacher.encoder.parameters(), strict=True):
                assert torch.equal(mine, theirs)
        optimiser.zero_grad()
        loss, figures = ours.loss(prepared, moment)
        loss.backward()
        optimiser.step()
        ours.after_step(moment)
        assert figures["gram"] > 0
    assert refreshed == [3, 6]
    assert {"gram_teacher.cls_token", "teacher.encoder.cls_token"} <= ours.state_dict().keys()
    assert all(parameter.grad is None for parameter in ours.gram_teacher.parameters())


def test_without_gram_there_is_no_third_network_and_masked_patches_alone_are_computed() -> None:
    ours = objective(gram_weight=0.0, gram_size=None)
    assert ours.gram_teacher is None and not ours.all_patches
    loss, figures = ours.loss(tile_objectives.batch(4), Moment(0, 10, 0))
    assert loss.isfinite() and "gram" not in figures


def test_two_micro_batches_have_the_loss_of_one() -> None:
    ours, whole = objective().double(), tile_objectives.batch(4, dtype=torch.float64, larger=True)
    moment = Moment(0, 10, 0)
    expected, _ = ours.loss(whole, moment)
    parts = ours.prepare([tile_objectives.part(whole, 0, 2), tile_objectives.part(whole, 2, 4)], moment)
    found = [ours.loss(part, Moment(0, 10, 0, first=2 * i))[0] for i, part in enumerate(parts)]
    torch.testing.assert_close(sum(found) / 2, expected, atol=1e-10, rtol=1e-10)


def test_gram_distance_of_few_patches_by_hand() -> None:
    right, up = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    student = torch.stack([right, up]).unsqueeze(0)  # cosines 1, 0, 0, 1
    teacher = torch.stack([right, right + up / 3 * 2]).unsqueeze(0)  # cosines 1, √½, √½, 1
    torch.testing.assert_close(gram_distance(student, teacher), torch.tensor(2 * 0.5 / 4))
    same = torch.randn(2, 9, 5)
    assert gram_distance(same, 3 * same) < 1e-12 and torch.equal(on_grid(same, 3), same)
    assert on_grid(torch.ones(2, 36, 5), 4).shape == (2, 16, 5)


def test_figures_of_dense_features_by_hand() -> None:
    a, b = torch.eye(2)
    rows = torch.stack([torch.stack([a, a, a]), torch.stack([b, b, b])])  # two rows of three patches
    pairs, neighbours, with_class = map_cosines(a.unsqueeze(0), rows.unsqueeze(0))[:, 0].tolist()
    assert pairs == pytest.approx(12 / 30) and neighbours == pytest.approx(4 / 7) and with_class == pytest.approx(0.5)
    looked = objective().look([tile_objectives.batch(4, larger=True)], Moment(0, 10, 0))
    assert {"patch_cosine", "neighbour_cosine", "class_patch_cosine", "teacher_entropy/ibot"} <= looked.keys()


# Larger views of what the global ones show ------------------------------------------------------------------------


def test_a_larger_view_shows_what_its_global_one_shows_and_leaves_the_others_as_they_were() -> None:
    tile = np.repeat(np.repeat(rng(0, "tile").integers(0, 256, (6, 6, 3), dtype=np.uint8), 16, 0), 16, 1)
    plain = CropSizes(2, 32, (0.3, 1.0), 3, 16, (0.05, 0.3), vertical_flip=0.5, quarter_turns=0.5)
    larger = CropSizes(
        **(vars(plain) | {"further": (FurtherViews(1, 8, (0.1, 0.2)), FurtherViews(2, 64, (1.0, 1.0), of_global=True))})
    )
    for sample in range(8):
        before, views = cut(tile, plain, 0, sample), cut(tile, larger, 0, sample)
        assert len(views) == 2 + 3 + 1 + 2 and all(
            torch.equal(one, other) for one, other in zip(before, views[:5], strict=True)
        )
        for small, large in zip(views[:2], views[-2:], strict=True):
            assert large.shape == (3, 64, 64)
            shrunk = torch.nn.functional.interpolate(large[None].float(), (32, 32), mode="area")[0]
            assert (shrunk - small.float()).abs().mean() < 8
    assert larger.twins() == {6: 0, 7: 1} and larger.kinds().tolist() == [0, 1, 2, 2, 2, 2, PLAIN, PLAIN]


def test_a_larger_view_keeps_its_colours_and_the_others_theirs() -> None:
    colour = Colour(1.0, 0.4, 0.4, 0.2, 0.1, 1.0, (1.0, 1.0, 1.0), (0.1, 2.0), (1.0, 1.0, 1.0), 1.0, 0.1)
    rows = draw_parameters(colour, np.array([0, 1, 2, PLAIN]), rng(0, "colour"))
    for column in (JITTER, GREY, SIGMA, SOLARISE, STAIN):
        assert rows[:3, column].all() and not rows[3, column]


def test_gram_without_larger_crops_is_one_sentence_before_the_first_step() -> None:
    with pytest.raises(Fault, match=r"^objective\.gram_weight=2 .*: set objective\.gram_size to more pixels"):
        unfilled_dinov3(tile_objectives.encoder(), gram_size=None)
    settings: dict[str, Any] = {"_target_": "pretrain.objectives.dinov3.DINOv3", "gram_weight": 2.0, "gram_size": GRAM}
    crops = load("tile", ["run=r", "data.shards=s", "data.crops.global_size=16"]).object().data.crops
    assert [views.size for views in checked_views(settings, 4, crops)] == [GRAM]
    crops.global_size = GRAM
    with pytest.raises(Fault, match=r"larger views of 2 global ones, of 24 px, .*global_count=2 of global_size=24"):
        checked_views(settings, 4, crops)


def test_the_stages_rates_are_their_schedules() -> None:
    def rates(recipe: str, *steps: int) -> list[float]:
        optim = load("tile", [f"recipe={recipe}", "run=r", "data.shards=s"]).object().optim
        return [rates_at(step, optim, 2048)[0] for step in steps]

    assert rates("dinov3_gram", 0, 2500, 5000, 150_000) == pytest.approx([0, 1.5e-5, 3e-5, 3e-5])
    assert rates("dinov3_highres", 0, 9_999, 25_000) == pytest.approx([0, 1.25e-5, 1.25e-5])
    assert rates("dinov3_vitl16", 12_500, 125_000) == pytest.approx([1e-3 * 2**0.5, 1e-6])
