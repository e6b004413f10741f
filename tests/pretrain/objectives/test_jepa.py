"""JEPA beside its golden: what is trained and what follows, its terms by hand, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.fault import Fault
from launch.entry import run_command_line
from models.vit import VisionTransformer
from pretrain.objectives.interface import Moment
from pretrain.objectives.losses.cross_entropy import cross_view_entropy
from pretrain.objectives.losses.spread import kde
from pretrain.objectives.packed_views import by_view
from pretrain.objectives.spreading import Spread
from pretrain.run import checkpoints
from pretrain.settings import plugins
from pretrain.settings.composition import load
from tests.pretrain.objectives.tile_objectives import SPREADING, batch, encoder, jepa, unfilled_jepa
from tests.pretrain.training.test_tile_training import TINY, metrics, weights

START = Moment(0, 10, 0)


def test_the_predictor_is_trained_and_followed_by_nobody() -> None:
    ours, given = jepa(), batch(4)
    assert set(ours.trained()) == {"encoder", "dino_head", "predictor"}
    assert set(ours.frozen()) == {"teacher.encoder", "teacher.dino_head"}
    teacher = [parameter.clone() for parameter in ours.teacher.parameters()]
    ours.loss(given, START)[0].backward()
    assert all(parameter.grad is not None for parameter in ours.predictor.parameters())
    assert all(parameter.grad is None for parameter in ours.teacher.parameters())
    ours.after_step(START)
    assert all(torch.equal(one, other) for one, other in zip(teacher, ours.teacher.parameters(), strict=True))


def test_the_loss_is_its_terms_computed_one_by_one() -> None:
    ours, given = jepa(dino_weight=2.0, patch_weight=3.0, spread_weight=0.5).double(), batch(4, dtype=torch.float64)
    loss, figures = ours.loss(given, START)
    masks = given.masks.flatten(1)
    (globals_, locals_) = (images for images, _ in given.crops)
    seen, small = ours.student.encoder([globals_, locals_], [masks, None])
    (taught,) = ours.teacher.encoder([globals_])
    far = F.smooth_l1_loss(ours.predictor(seen.patches), F.layer_norm(taught.patches, (16,)), reduction="none").mean(-1)
    patches = sum(far[i][masks[i]].mean() for i in range(8) if masks[i].any()) / 8
    (prepared,) = ours.prepare([given], START)
    assert prepared.targets is not None
    scores = by_view(ours.student.dino_head(torch.cat([seen.cls, small.cls])), given)
    of_classes = sum(cross_view_entropy(scores, prepared.targets["dino"]().unflatten(0, (2, -1)), 0.1))
    spread = kde(seen.cls, 2)
    torch.testing.assert_close(loss, 2 * of_classes + 3 * patches + 0.5 * 2 * spread)
    torch.testing.assert_close(figures["patches"], patches)


def test_held_out_tiles_are_judged_without_stochastic_depth_or_gradients() -> None:
    ours = jepa(drop_path=0.5).eval()
    with torch.no_grad():
        losses = [ours.loss(batch(4), Moment(step, 10, 0))[0] for step in (0, 1)]
    assert losses[0] == losses[1] and not losses[0].requires_grad
    assert {"patch_cosine", "teacher_entropy/dino"} <= ours.look([batch(4)], START).keys()


def test_a_spread_rises_between_two_shares_of_the_run_and_has_its_concentration() -> None:
    settings = SPREADING | {"spread": "kde", "spread_weight": 0.4, "spread_concentration": 10.0}
    begun = Spread(settings | {"spread_ramp": [0.3, 0.3]}, 4)  # type: ignore[typeddict-item]
    assert [begun.weight(Moment(step, 10, 0)) for step in (0, 2, 3, 9)] == [0, 0, begun.peak, begun.peak]
    ramped = Spread(settings | {"spread_ramp": [0.1, 0.5]}, 4)  # type: ignore[typeddict-item]
    weights = [ramped.weight(Moment(step, 100, 0)) for step in (0, 10, 30, 50, 100)]
    assert weights == pytest.approx([0, 0, 0.2, 0.4, 0.4])
    assert Spread(settings, 4).weight(START) == 0.4  # type: ignore[arg-type]
    x = torch.randn(8, 5)
    torch.testing.assert_close(ramped(x, START), kde(x, 4, 10.0))
    assert ramped(x, START) != kde(x, 4)


# What is refused ---------------------------------------------------------------------------------------------------


class Unmasked(VisionTransformer):
    """An encoder that can't hide a patch."""

    def __init__(self, *, width: int) -> None:
        super().__init__(image_size=16, patch_size=4, width=width, depth=1, heads=2, feed_forward_width=32)
        del self.mask_token


def test_an_encoder_without_a_mask_token_is_one_sentence_before_anything_is_done() -> None:
    objective = load("tile", ["recipe=small_jepa", "run=r", "data.shards=s"]).object().objective
    with pytest.raises(
        Fault, match=r"replaced by a token, and Unmasked has none: give it a parameter mask_token"
    ) as caught:
        plugins.build(objective, lambda: Unmasked(width=16))
    assert "\n" not in str(caught.value)


def test_heads_that_don_t_divide_the_predictors_width_are_one_sentence() -> None:
    words = ["recipe=small_jepa", "run=r", "data.shards=s", "objective.predictor_heads=5"]
    with pytest.raises(
        Fault, match=r"^objective\.predictor_width=48 and objective\.predictor_heads=5 don't go together"
    ):
        load("tile", [*words, "objective.predictor_width=48"])
    with pytest.raises(Fault, match="predictor's width, 192, is not divisible by predictor_heads=5"):  # the encoder's
        load("tile", words)
    with pytest.raises(ValueError, match="predictor_heads=3"):
        unfilled_jepa(encoder(), predictor_width=16, predictor_heads=3)


# A run --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_bit_for_bit(tile_shards: Path, tmp_path: Path) -> None:
    words = [f"data.shards={tile_shards}", *(word for word in TINY if "ibot" not in word)]
    words += ["objective=jepa", "objective.predictor_heads=2", "objective.spread_ramp=[0.2,0.8]", "optim.steps=4"]
    words += [
        "model.drop_path=0.3",
        "model.drop_path_rising=true",
        "trainer.accumulate=2",
        "data.colour.stain_sigma=0.1",
    ]
    words += ["data.masks.kind=squares", "data.masks.share=1", "data.colour.stain_probability=0.5", "watch.every=2"]
    run_command_line(["tile", f"run={tmp_path / 'whole'}", *words])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    newest = checkpoints.newest(tmp_path / "again")
    assert newest is not None
    shutil.rmtree(newest)
    run_command_line(["tile", f"run={tmp_path / 'again'}", *words])
    assert metrics(tmp_path / "again") == metrics(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "again"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(name.startswith("predictor.") for name in theirs)
    assert all(record["patches"] > 0 for record in metrics(tmp_path / "whole") if "loss" in record)
