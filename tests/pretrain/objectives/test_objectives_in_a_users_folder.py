"""A second slide objective, a tile objective with a third kind of view, and one of the class token alone: each one
Python file and one YAML file in a folder of a user's."""

from pathlib import Path

import pytest

from launch.entry import run_command_line
from pretrain.objectives.contract import OF_THE_RECORD
from pretrain.run.metrics import read_metrics
from tests.pretrain.training.test_slide_training import SMALL
from tests.pretrain.training.test_slide_training import words as slide_words
from tests.pretrain.training.test_tile_training import command
from tests.pretrain.training.wavy_slides import write_wavy_slides

pytestmark = pytest.mark.usefixtures("one_thread", "no_process_group")

TWO_HALVES = '''
"""The visible tiles of a slide are to tell which masked tiles are its own (InfoNCE)."""

import torch
import torch.nn.functional as F

from pretrain.objectives.interface import SlideObjective


class TwoHalves(SlideObjective):
    masks = True
    score = "retrieved"
    evaluation_passes = 2

    def __init__(self, make_encoder, *, temperature: float) -> None:
        super().__init__()
        self.encoder, self.temperature = make_encoder(), temperature

    def trained(self):
        return {"encoder": self.encoder}

    def similar(self, batch):
        both = ((batch.visible, batch.visible_lengths), (batch.masked, batch.masked_lengths))
        seen = [self.encoder(batch.targets()[which], batch.cells[which], lengths) for which, lengths in both]
        one, other = (F.normalize(half.pooled.float(), dim=1) for half in seen)
        return one @ other.T / self.temperature

    def loss(self, batch, moment):
        similar = self.similar(batch)
        return F.cross_entropy(similar, torch.arange(len(similar))), {"halves": len(similar)}

    def judged(self, batch):
        return {"found": self.similar(batch).argmax(1) == torch.arange(len(batch.lengths))}

    def evaluate(self, rows):
        return {"retrieved": rows["found"].mean()}
'''

DETAIL = '''
"""DINOv2 whose student also sees a tile's details, a third kind of view, and whose patches are all to agree with
their tile."""

import torch.nn.functional as F

from data.tiles.crops import FurtherViews
from pretrain.objectives.dinov2 import DINOv2


class Detail(DINOv2):
    all_patches = True

    @classmethod
    def further_views(cls, settings):
        return [FurtherViews(count=3, size=8, scale=(0.01, 0.05))]

    def loss_of(self, tokens, batch, moment):
        total, figures = super().loss_of(tokens, batch, moment)
        images, views = batch.crops[2]
        assert images.shape[1:] == (3, 8, 8) and views == 3
        patches, detail = tokens[0].patches, tokens[2]
        assert patches.shape[:2] == batch.masks.flatten(1).shape and detail.patches.ndim == 3
        tile = patches.float().mean(1).unflatten(0, (batch.crops[0][1], -1)).mean(0)
        agree = F.cosine_similarity(detail.cls.float().unflatten(0, (views, -1)), tile.detach(), dim=-1).mean()
        return total - agree, figures | {"agree": agree.detach()}
'''

CLASS_TOKEN = '''
"""Class tokens of two views of a tile are to be alike, and those of the tiles to vary (VICReg's first two terms)."""

from pretrain.objectives.interface import Objective


class ClassToken(Objective):
    learns = "to see that two views are of one tile"
    reading = "A deviation stays at 0 where all tiles look alike."

    def __init__(self, make_encoder, *, least: float) -> None:
        super().__init__()
        self.encoder, self.least = make_encoder(), least

    def trained(self):
        return {"encoder": self.encoder}

    def loss(self, batch, moment):
        (tokens,) = self.encoder([batch.crops[0][0]])
        views = tokens.cls.float().unflatten(0, (batch.crops[0][1], -1))
        deviation = views.std(1)
        alike = (views[0] - views[1]).square().mean()
        return alike + (self.least - deviation).relu().mean(), {"deviation": deviation.mean()}
'''


def write_folder(folder: Path, module: str, code: str, settings: str) -> list[str]:
    """The two files of an objective; words that choose it."""
    (folder / "objective").mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (folder / "objective" / "mine.yaml").write_text(settings)
    return ["objective=mine", "--config-dir", str(folder)]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


@pytest.mark.slow
def test_a_second_slide_objective_trains_resumes_and_is_planned_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write_folder(
        tmp_path / "own", "two_halves", TWO_HALVES, "_target_: two_halves.TwoHalves\ntemperature: 0.1\n"
    )
    run_command_line(["plan", "recipe=small_slide", "hardware=cpu", *mine])
    assert "encoder blocks" in capsys.readouterr().out
    store = write_wavy_slides(tmp_path / "embeddings", 6, columns=8, rows=6, fewer=6)
    small = [word for word in SMALL if not word.startswith("objective.")]
    steps = [*small, "optim.warmup_steps=1", "trainer.checkpoint_every=2", *mine]
    run_command_line(slide_words(tmp_path / "run", store, "optim.steps=3", "optim.schedule_steps=5", *steps))
    run_command_line(
        slide_words(tmp_path / "run", store, "optim.steps=5", "optim.schedule_steps=5", "allow_changes=true", *steps)
    )
    run_command_line(slide_words(tmp_path / "whole", store, "optim.steps=5", "optim.schedule_steps=5", *steps))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 5
    assert [line["step"] for line in read_metrics(tmp_path / "whole") if "retrieved" in line] == [2, 4, 5]
    assert (tmp_path / "whole" / "checkpoints" / "best").exists()
    run_command_line(["report", f"run={tmp_path / 'whole'}", f"out={tmp_path / 'page.html'}"])
    assert "Retrieved" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_a_tile_objective_with_a_third_kind_of_view_and_all_patches_trains_resumes_and_is_planned_and_reported(
    tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write_folder(
        tmp_path / "own", "detail", DETAIL, "defaults:\n  - dinov2\n  - _self_\n_target_: detail.Detail\n"
    )
    run_command_line(["plan", "recipe=small", "model.patch_size=8", "hardware=cpu", *mine])
    assert "encoder blocks" in capsys.readouterr().out
    small = ["prototypes=64", "hidden=32", "bottleneck=16", "group_size=4"]
    steps = ["optim.schedule_steps=5", "model.patch_size=4", *(f"objective.{word}" for word in small), *mine]
    run_command_line(command(tile_shards, tmp_path / "run", "optim.steps=3", *steps))
    run_command_line(command(tile_shards, tmp_path / "run", "optim.steps=5", "allow_changes=true", *steps))
    run_command_line(command(tile_shards, tmp_path / "whole", "optim.steps=5", *steps))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 5
    assert all("agree" in line for line in read_metrics(tmp_path / "whole") if "loss" in line)
    run_command_line(["report", f"run={tmp_path / 'whole'}", f"out={tmp_path / 'page.html'}"])
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_tile_objective_of_its_own_without_masks_trains_resumes_and_its_words_are_on_the_page_where_they_may_be(
    tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write_folder(tmp_path / "own", "class_token", CLASS_TOKEN, "_target_: class_token.ClassToken\nleast: 1.0\n")
    small = [word for word in command(tile_shards, tmp_path / "run") if not word.startswith("objective.")]
    small += ["optim.schedule_steps=3", "data.crops.local_count=0", *mine]
    run_command_line([*small, "optim.steps=2"])
    run_command_line([*small, "optim.steps=3", "allow_changes=true"])  # the mask token has never had a gradient
    assert len(losses(tmp_path / "run")) == 3
    recorded = {name for line in read_metrics(tmp_path / "run") for name in line}
    assert {name for name in recorded if not OF_THE_RECORD.fullmatch(name)} - {"slide_knn", "slide_chance"} == {
        "deviation"
    }
    pages = []
    for allowed in ([], ["allow_plugins=[class_token]"]):
        run_command_line(["report", f"run={tmp_path / 'run'}", f"out={tmp_path / 'page.html'}", *allowed])
        pages.append((tmp_path / "page.html").read_text())
    assert "learned from tiles without labels." in pages[0] and "A deviation stays" not in pages[0]
    assert "learned to see that two views are of one tile." in pages[1] and "A deviation stays at 0 where" in pages[1]
    assert not any("class-token" in page or "KoLeo" in page or "teacher" in page for page in pages)
