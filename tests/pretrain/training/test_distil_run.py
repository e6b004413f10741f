"""A run of distillation: resumed bit for bit, without the given teacher in its checkpoints, and with no other one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.entry import run_command_line
from pretrain.encoders.run_checkpoint import find_checkpoint, teacher
from pretrain.run import checkpoints
from tests.pretrain.objectives.tile_objectives import teacher_file
from tests.pretrain.training.test_tile_training import TINY, metrics, refused, weights

pytestmark = pytest.mark.usefixtures("one_thread")

DISTIL = [
    *(word for word in TINY if not word.startswith("objective.")),
    "objective=distil",
    "objective.group_size=4",
    "objective.teacher_heads=3",
    "objective.teacher_momentum=0.5",
    "model.drop_path=0.3",
    "trainer.accumulate=2",
    "optim.steps=4",
    "watch.every=2",
]


def test_a_run_goes_on_with_the_same_teacher_bit_for_bit_and_with_no_other(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, whole, again = tmp_path / "given.safetensors", tmp_path / "whole", tmp_path / "again"
    shutil.copy(teacher_file(), given)
    words = [f"data.shards={tile_shards}", *DISTIL, f"objective.teacher={given}"]
    run_command_line(["tile", f"run={whole}", *words])
    shutil.copytree(whole, again)
    newest = checkpoints.newest(again)
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    assert [len(digest) for digest in state["rests_on"].values()] == [16]
    shutil.rmtree(newest)
    changed = load_file(given)
    save_file(changed | {"norm.bias": changed["norm.bias"] + 1}, given)
    said = refused(["tile", f"run={again}", *words], capsys)
    assert f"objective.teacher={given} holds other weights than {again} has learned from until now; put" in said
    shutil.copy(teacher_file(), given)
    run_command_line(["tile", f"run={again}", *words])
    assert metrics(again) == metrics(whole)
    ours, theirs = weights(again), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(name.startswith("given") for name in theirs)
    network, _ = teacher(find_checkpoint(whole))
    for name, tensor in network.state_dict().items():
        assert torch.equal(theirs[f"teacher.encoder.{name}"], tensor)
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(theirs[f"teacher.encoder.{key}"], theirs[f"encoder.{key}"])


def test_a_teacher_that_is_not_named_is_asked_for(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["tile", f"run={tmp_path / 'run'}", f"data.shards={tile_shards}", *DISTIL], capsys)
    assert "objective.teacher= names nothing: give the encoder to be learned from" in said
