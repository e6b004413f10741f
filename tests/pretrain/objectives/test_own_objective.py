"""An objective of a user's is one class and one YAML file: it starts from its constructor's values, beside any recipe,
and can be planned."""

from pathlib import Path

import pytest
import torch

from launch.entry import run_command_line
from pretrain.plan.rehearsal import RehearsedBatch, rehearse
from pretrain.settings import plugins
from pretrain.settings.annotation import annotated
from pretrain.settings.composition import load
from pretrain.training.sharding import materialise
from tests.pretrain.objectives.pairwise_objective import Pairwise
from tests.pretrain.objectives.tile_objectives import batch, encoder

SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "feed_forward_width": 32,
    "layer_scale": 1.0,
}


def make(way: str = "index") -> Pairwise:
    return Pairwise(
        lambda: plugins.build_empty({"_target_": "models.vit.VisionTransformer", **SIZES}), width=8, way=way
    )


def started(seed: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        objective = make()
    materialise(objective, torch.device("cpu"), seed, make_objective=make)
    return objective.state_dict()


def test_what_has_no_initialise_starts_as_its_constructor_says_keyed_by_the_seed() -> None:
    torch.manual_seed(5)
    one, again, other = started(0), started(0), started(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    weight = "projector.0.weight"
    assert not torch.equal(one[weight], other[weight])
    assert 0.2 < one[weight].abs().max() <= 16**-0.5  # torch's default for a linear: U(±1/√fan_in)
    assert one["projector.2.bias"].unique().tolist() == [0.25] and one["scale.log"].tolist() == [2.0]
    assert one["centre"].unique().tolist() == [1.0]
    assert (
        one["projector.1.running_mean"].tolist() == [0.0] * 8 and one["projector.1.running_var"].tolist() == [1.0] * 8
    )
    assert one["projector.1.num_batches_tracked"].item() == 0
    torch.manual_seed(0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    started(3)
    assert torch.equal(torch.rand(3), drawn)  # nobody else's draws move


def test_an_encoders_values_are_not_moved_by_what_stands_beside_it() -> None:
    from models.initialise import initialise

    alone = encoder(depth=1)()
    initialise(alone, 0, "encoder")
    assert all(torch.equal(value, started(0)[f"encoder.{name}"]) for name, value in alone.state_dict().items())


@pytest.mark.parametrize("way", ["index", "masked_select", "where", "stack"])
def test_an_objective_that_compares_patches_in_pairs_can_be_rehearsed(way: str) -> None:
    real = make(way)
    grid, tiles = 4, 6
    shapes = batch(tiles)

    def fake():  # type: ignore[no-untyped-def]
        crops = [(torch.empty(images.shape), views) for images, views in shapes.crops]
        return type(shapes)(crops, torch.empty(2 * tiles, grid, grid, dtype=torch.bool))

    found = rehearse(lambda: make(way), RehearsedBatch(fake, {2 * tiles * grid * grid: 7}, tiles), processes=1)
    pairs = 2 * tiles * 16 * 16 * 8 * 2  # operations of the products between patches
    assert sum(found.flops.values()) > 3 * pairs and found.phases
    assert found.flops["losses", "forward"] == pairs and len(list(real.parameters()))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "own.yaml").write_text(
        "_target_: tests.pretrain.objectives.pairwise_objective.Pairwise\nwidth: 8\nway: index\n"
    )
    return tmp_path


def test_a_chosen_objective_drops_what_the_recipe_sets_of_another_one_and_says_which(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed = load("tile", ["objective=own", "objective.width=4"], [own])
    assert dict(composed.tree.objective) == {
        "_target_": "tests.pretrain.objectives.pairwise_objective.Pairwise",
        "width": 4,
        "way": "index",
    }
    assert "objective.group_size" in composed.left_out and "objective.hidden" in composed.left_out
    assert composed.tree.optim.lr == load("tile", []).tree.optim.lr  # the rest of the recipe stays
    run_command_line(["tile", "objective=own", "--config-dir", str(own), "--cfg", "job"])
    said = capsys.readouterr().err
    assert (
        "the recipe's objective.bottleneck, objective.centring, objective.group_size, " in said and "left out" in said
    )


def test_a_value_that_both_objectives_have_is_the_chosen_ones_and_its_own_recipe_keeps_everything() -> None:
    small = load("tile", []).tree.objective
    chosen = load("tile", ["objective=dino", "objective.hidden=64"])
    assert chosen.tree.objective.prototypes != small.prototypes and chosen.tree.objective.hidden == 64
    line = next(line for line in annotated(chosen).splitlines() if line.strip().startswith("prototypes:"))
    assert line.endswith("[objective/dino]")
    for words in (["objective=dinov2"], ["recipe=small_mae", "objective=mae"], ["recipe=small_dino", "objective=dino"]):
        same = load("tile", words)
        assert not same.left_out and same.tree == load("tile", [word for word in words if "recipe" in word]).tree


def test_the_plan_of_ones_own_objective_is_made_beside_the_default_recipe(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command_line(
        ["plan", "--config-dir", str(own), "objective=own", "hardware=cpu", "data.batch_size=8", "model.depth=1"]
    )
    said = capsys.readouterr()
    assert "Plan, computed and not measured" in said.out and "are another objective's, and left out" in said.err
