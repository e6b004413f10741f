"""Whose code is run: anybody's that the user names, and of what a run's folder names, this project's and what the user
allows."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.fault import Fault
from models.vit import VisionTransformer
from pretrain.commands import embed, export, probe, report
from pretrain.encoders import init
from pretrain.settings import plugins
from pretrain.settings.composition import load

MODULE = (
    "from pathlib import Path\nfrom models.vit import VisionTransformer\nPath({mark!r}).touch()\nclass"
    " Theirs(VisionTransformer):\n    pass\n"
)


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that appears where a module ``theirs`` is imported; the module lies in a folder of its own."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "theirs.py").write_text(MODULE.format(mark=str(tmp_path / "imported")))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    yield tmp_path / "imported"
    sys.modules.pop("theirs", None)


@pytest.fixture
def foreign_run(make_tile_run: Callable[[], tuple[Path, Any]]) -> Path:
    """A tile run whose config.yaml names the class ``theirs.Theirs``."""
    run, _ = make_tile_run()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["_target_"] = "theirs.Theirs"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def commands(run: Path, shards: Path, classes: Path, out: Path) -> dict[str, Callable[[str], Any]]:
    """The commands that read a run's folder, each to be called with a further word."""

    def command(module: Any, name: str, *words: str) -> Callable[[str], Any]:
        return lambda word: module.run(load(name, [*words, word]).object())

    return {
        "embed": command(
            embed, "embed", f"checkpoint={run}", f"shards={shards}", f"out={out}/embeddings", "device=cpu"
        ),
        "export": command(export, "export", f"checkpoint={run}", f"out={out}/encoder"),
        "probe": command(probe, "probe", f"checkpoint={run}", f"train={classes}", "device=cpu"),
        "report": command(report, "report", f"run={run}", f"out={out}/report.html"),
        "init": lambda word: init.find_encoder(
            str(run), load("tile", ["run=a", "data.shards=b", word]).object().allow_plugins
        ),
    }


@pytest.mark.parametrize("name", ["embed", "export", "probe", "report", "init"])
def test_a_runs_folder_names_no_code_but_ours_and_what_is_allowed_by_name(
    name: str,
    foreign_run: Path,
    theirs: Path,
    shards: Path,
    class_folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "code")
    command = commands(foreign_run, shards, class_folders, tmp_path / "out")[name]
    for word in ("allow_plugins=[]", "allow_plugins=[the]", "allow_plugins=[theirs.Theirs]"):
        with pytest.raises(Fault, match=r"theirs\.Theirs was read from a run's folder, .*allow_plugins=\[theirs\]"):
            command(word)
        assert not theirs.exists() and "theirs" not in sys.modules
    command("allow_plugins=[theirs]")
    assert theirs.exists()


def test_what_is_allowed_is_not_taken_from_the_current_folder_by_accident(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "code")
    for entry in ("", str(tmp_path / "code")):  # 'python -m', and PYTHONPATH=:
        monkeypatch.setattr(sys, "path", [entry, *sys.path])
        with pytest.raises(Fault, match="can't be imported"):
            plugins.locate_class("theirs.Theirs", allowed=["theirs"])
        assert not theirs.exists() and sys.path[0] == entry
    monkeypatch.setenv("PYTHONPATH", os.pathsep + str(tmp_path / "code"))
    assert issubclass(plugins.locate_class("theirs.Theirs", allowed=["theirs"]), VisionTransformer) and theirs.exists()


def test_ours_is_the_whole_name_of_a_package() -> None:
    assert plugins.locate_class("models.vit.VisionTransformer", allowed=()) is VisionTransformer
    for target in ("models_of_mine.A", "os.path.A", "A", "", ".models.A"):
        with pytest.raises(Fault, match="read from a run's folder"):
            plugins.locate_class(target, allowed=())


def test_a_run_of_the_users_own_names_any_class(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path / "code")
    tile = load("tile", ["run=a", "data.shards=b", "model._target_=theirs.Theirs"]).object()
    assert type(plugins.build(tile.model)).__name__ == "Theirs" and theirs.exists()


def test_settings_that_classes_share_are_those_of_a_table_that_they_unpack() -> None:
    settings = plugins.settings_of("pretrain.objectives.dino.DINO")
    assert settings["group_size"] is int and settings["teacher_momentum"] is float and "teaching" not in settings
    assert plugins.why_unknown("pretrain.objectives.dino.DINO", "teacher_speed") is None
    with pytest.raises(Fault, match=r"objective\.teacher_momentum=1\.5 is not allowed"):
        load("tile", ["run=a", "data.shards=b", "objective=dino", "objective.teacher_momentum=1.5"]).object()


def test_a_network_of_a_users_folder_keeps_its_own_values_where_the_recipe_sets_those_of_another(
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wide.yaml").write_text("_target_: networks_of_mine.Wide\npatch_size: 8\nbreadth: 12\n")
    (tmp_path / "networks_of_mine.py").write_text(
        "from torch import nn\n\n\nclass Wide(nn.Module):\n"
        "    def __init__(self, *, patch_size: int, breadth: int) -> None:\n        super().__init__()\n"
    )
    words = ["recipe=small", "run=a", "data.shards=b", "model=wide", "model.breadth=16"]
    composed = load("tile", words, [tmp_path])
    assert dict(composed.tree.model) == {"_target_": "networks_of_mine.Wide", "patch_size": 8, "breadth": 16}
    assert "model.width" in composed.left_out and "another model's, and left out" in composed.says_left_out()


def test_another_source_does_without_what_a_recipe_says_of_its_own_and_keeps_views_and_batch() -> None:
    composed = load("tile", ["recipe=nanopath", "run=r", "data=tiles", "data.shards=s", "data.lanes=4"])
    assert composed.left_out == ["data.hold_out", "data.slide", "data.slide_pattern"]
    data = composed.object().data
    assert (data.batch_size, data.lanes, data.crops.local_count, data.min_saturated) == (128, 4, 8, 0.5)
    assert load("tile", ["recipe=nanopath", "run=r", "data.files=s"]).left_out == []


def test_a_class_that_is_not_there_is_said_with_the_places_where_it_may_lie() -> None:
    with pytest.raises(Fault, match=r"No module named 'nowhere'.* whose file lies in a folder that --config-dir or"):
        load("tile", ["run=a", "data.shards=b", "model._target_=nowhere.Net"])
