"""Runs of distillation: resumed bit for bit, without the given teacher in its checkpoints, and with no other one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.entry import run_command_line
from pretrain.encoders.run_checkpoint import find_checkpoint, teacher
from pretrain.run import checkpoints
from tests.pretrain.objectives.tile_objectives import teacher_file, teacher_run
from tests.pretrain.training.test_tile_training import TINY, metrics, refused, weights

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = [
    *(word for word in TINY if not word.startswith("objective.")),
    "objective.group_size=4",
    "objective.teacher_momentum=0.5",
    "model.drop_path=0.3",
    "trainer.accumulate=2",
    "optim.steps=4",
    "watch.every=2",
]
DISTIL = [*COMMON, "objective=distil", "objective.teacher_heads=3"]
HEADS = [*COMMON, "objective=distil_heads"]


def file_given(place: Path, changed: bool) -> None:
    weights = load_file(teacher_file())
    save_file(weights | ({"norm.bias": weights["norm.bias"] + 1} if changed else {}), place)


def run_given(place: Path, changed: bool) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(teacher_run(seed=8 if changed else 7), place)


@pytest.mark.parametrize(("setting", "give"), [(DISTIL, file_given), (HEADS, run_given)], ids=["features", "heads"])
def test_a_run_goes_on_with_the_same_teacher_wherever_it_lies_bit_for_bit_and_with_no_other(
    setting: list[str],
    give: Callable[[Path, bool], None],
    tile_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, whole, again = tmp_path / "given.safetensors", tmp_path / "whole", tmp_path / "again"
    give(given, False)
    words = [f"data.shards={tile_shards}", *setting, f"objective.teacher={given}"]
    run_command_line(["tile", f"run={whole}", *words])
    shutil.copytree(whole, again)
    newest = checkpoints.newest(again)
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    assert [len(digest) for digest in state["rests_on"].values()] == [16]
    shutil.rmtree(newest)
    give(given, True)
    said = refused(["tile", f"run={again}", *words], capsys)
    assert f"objective.teacher={given} holds other weights than {again} has learned from until now; put" in said
    moved = tmp_path / "moved" / given.name
    moved.parent.mkdir()
    give(moved, True)
    there = [*words[:-1], f"objective.teacher={moved}"]
    with pytest.raises(SystemExit):
        run_command_line(["tile", f"run={again}", *there])
    said = "".join(capsys.readouterr())
    assert f"other settings (objective.teacher: {given} → {moved})" in said and "resuming" not in said
    give(moved, False)
    run_command_line(["tile", f"run={again}", *there])
    assert "resuming after step 2 of 4" in "".join(capsys.readouterr())
    assert metrics(again) == metrics(whole)
    ours, theirs = weights(again), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(name.startswith("given") for name in theirs)
    network, _ = teacher(find_checkpoint(whole))
    for name, tensor in network.state_dict().items():
        assert torch.equal(theirs[f"teacher.encoder.{name}"], tensor)
    (student,) = {"encoder.", "student.encoder."} & {name.partition("blocks")[0] for name in theirs}
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(theirs[f"teacher.encoder.{key}"], theirs[f"{student}{key}"])


@pytest.mark.parametrize("setting", [DISTIL, HEADS], ids=["features", "heads"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "objective.teacher= names nothing: give the "),
        (["objective.teacher=nowhere/run"], "objective.teacher=nowhere/run: there is no folder nowhere/run"),
    ],
    ids=["unnamed", "missing"],
)
def test_a_teacher_that_can_not_be_had_is_said_before_the_data_is_looked_for(
    setting: list[str], words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["tile", f"run={tmp_path / 'run'}", f"data.shards={tmp_path / 'none'}", *setting, *words], capsys)
    assert says in said
