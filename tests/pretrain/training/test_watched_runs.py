"""Whole runs that are watched: a collapsing one is noticed and a healthy one isn't, the best checkpoint stays, waiting
ends."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.entry import run_command_line
from pretrain.encoders.loading import load_encoder
from pretrain.report.parts import read_run
from pretrain.report.training import tile_section
from pretrain.run import checkpoints
from pretrain.run.metrics import read_metrics
from tests.data.shards.tile_folders import write_tiles
from tests.pretrain.training.test_tile_training import assert_close, command, finish, start
from tests.pretrain.training.test_watching import write_classes

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHING = [
    "optim.steps=40",
    "trainer.checkpoint_every=20",
    "watch.every=10",
    "optim.warmup_steps=10",
    "optim.lr=1e-3",
    "objective.teacher_temperature=0.04",
]
COLLAPSE = {
    "the published KDE alone pulls features together": (
        [
            "objective.spread=kde_as_published",
            "objective.spread_weight=1",
            "objective.dino_weight=0",
            "objective.ibot_weight=0",
            "data.colour.jitter_probability=0",
            "data.colour.grey_probability=0",
            "data.colour.solarise_probability=[0,0,0]",
        ],
        {"parallel features"},
    ),
    "a teacher too hot to prefer anything": (
        ["objective.centring=centre", "objective.teacher_temperature=10", "objective.teacher_temperature_start=10"],
        {"same target", "uniform teacher"},
    ),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("watched") / "shards", [100, 100])


def alarms_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if "alarm" in line]


def test_a_healthy_run_raises_no_alarm_and_shows_crops_at_every_look(shards: Path, tmp_path: Path) -> None:
    run_command_line(command(shards, tmp_path / "run", *TEACHING))
    assert alarms_of(tmp_path / "run") == []
    looks = [line for line in read_metrics(tmp_path / "run") if "rankme" in line]
    assert [line["step"] for line in looks] == [10, 20, 30, 40]
    assert {"teacher_entropy/dino", "prototype_use/ibot", "feature_cosine", "feature_std"} <= looks[0].keys()
    assert all(0 <= line["slide_knn"] <= 1 and line["slide_chance"] == 0.5 for line in looks)
    assert all(line["peak_memory_gib"] > 0.05 for line in read_metrics(tmp_path / "run") if "loss" in line)
    pictures = sorted(path.name for path in (tmp_path / "run" / "samples").glob("*.png"))
    assert pictures == [f"step-000000{step:02d}.png" for step in (0, 10, 20, 30, 40)]


@pytest.mark.parametrize("cause", COLLAPSE)
def test_a_collapsing_run_says_so_in_words_once_and_puts_it_on_record(
    cause: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, expected = COLLAPSE[cause]
    run = tmp_path / "run"
    run_command_line(command(shards, run, *TEACHING, *settings))
    raised = alarms_of(run)
    names = [line["alarm"] for line in raised]
    assert expected <= set(names) and len(names) == len(set(names))
    said = capsys.readouterr().err
    for line in raised:
        assert f"ALARM at step {line['step']}, {line['alarm']}: {line['says']}" in said
        assert line["since"] <= line["step"] and "Usually helps" in line["says"]
    shutil.rmtree(checkpoints.complete(run)[-1])  # the run goes on from step 20
    run_command_line(command(shards, run, *TEACHING, *settings))
    assert alarms_of(run) == raised
    again = capsys.readouterr().err
    assert all((f"ALARM at step {line['step']}, {line['alarm']}" in again) == (line["step"] > 20) for line in raised)


@pytest.mark.parametrize("beside", [[], pytest.param(["trainer.devices=2"], marks=pytest.mark.slow)])
def test_a_probe_ends_a_run_that_no_longer_gains_keeps_its_best_checkpoint_and_is_the_same_on_two_processes(
    beside: list[str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = write_classes(
        tmp_path / "labelled", {"light": 13, "dark": 12}, gap=150
    )  # told apart from the first look on
    watched = [
        "optim.steps=8",
        "trainer.checkpoint_every=2",
        "trainer.keep_checkpoints=1",
        "watch.every=2",
        f"watch.probe={labelled}",
        "trainer.accumulate=2",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    process = start(command(shards, two, *watched, "watch.patience=2", *beside)) if beside else None
    run_command_line(command(shards, one, *watched, "watch.patience=2"))
    said = capsys.readouterr().err
    assert "ends after step 6: probe_knn has not risen above 1.0000, of step 2, in 2 checkpoints" in said
    assert "longer training has made published models worse" in said
    if process:
        finish(process)
        assert_close(two, one)
    first = [line for line in read_metrics(one) if line["step"] == 0]
    assert len(first) == 1 and {"probe_knn", "probe_knn_se_tiles", "slide_knn"} <= first[0].keys()
    for run in (one, two) if process else (one,):
        assert [path.name for path in checkpoints.complete(run)] == ["step-00000002", "step-00000006"]
        assert os.readlink(run / "checkpoints" / "best") == "step-00000002"
    assert (
        load_encoder(str(one / "checkpoints" / "best"), "cpu").hash
        == load_encoder(str(one / "checkpoints" / "step-00000002"), "cpu").hash
    )

    before = (one / "metrics.jsonl").read_text()
    run_command_line(command(shards, one, *watched, "watch.patience=2"))  # it is done, and says why
    assert "ends after step 6" in capsys.readouterr().err and (one / "metrics.jsonl").read_text() == before
    run_command_line(command(shards, one, *watched))  # without patience it goes on
    assert [
        line["step"] for line in map(json.loads, (one / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ] == list(range(1, 9))
    assert [path.name for path in checkpoints.complete(one)] == ["step-00000002", "step-00000008"]


def test_patience_without_a_probe_is_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command_line(command(shards, tmp_path / "run", "watch.patience=3"))
    assert "watch.patience=3 and watch.probe=null don't go together" in capsys.readouterr().err


@pytest.mark.parametrize("every", [0, 100])
def test_how_well_slides_are_told_is_on_record_at_the_first_step_and_the_last_whenever_looks_are(
    every: int, shards: Path, tmp_path: Path
) -> None:
    labelled = write_classes(tmp_path / "labelled", {"light": 4, "dark": 4}, gap=150)
    probe = [] if every else [f"watch.probe={labelled}"]
    run_command_line(command(shards, tmp_path / "run", "optim.steps=2", f"watch.every={every}", *probe))
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "slide_knn" in row] == [0, 2]
    watched = json.loads((tmp_path / "run" / "provenance.json").read_text())["starts"][-1]["watched"]
    assert watched.keys() == ({"watch.probe"} if probe else set())
    section = tile_section(read_run(tmp_path / "run"), "")
    assert section is not None and ("watch.probe" in section.body) == bool(probe)
