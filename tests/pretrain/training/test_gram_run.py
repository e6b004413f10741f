"""A run with Gram anchoring: its earlier teacher is in the checkpoint, and it resumes bit for bit across a refresh."""

import shutil
from pathlib import Path

import pytest
import torch

from launch.entry import run_command_line
from pretrain.run import checkpoints
from pretrain.run.metrics import read_metrics
from tests.pretrain.training.test_tile_training import TINY, metrics, weights

pytestmark = pytest.mark.usefixtures("one_thread")

GRAM = [
    "objective=dinov3",
    "objective.gram_weight=2",
    "objective.gram_size=48",
    "objective.gram_every=3",
    "objective.teacher_momentum=0.5",
    "model.position_embedding=rope",
    "model.position_rescale=2",
    "optim.steps=4",
    "watch.every=2",
]


def test_a_run_goes_on_across_a_refresh_of_its_earlier_teacher_bit_for_bit(tile_shards: Path, tmp_path: Path) -> None:
    words = [f"data.shards={tile_shards}", *TINY, *GRAM]
    run_command_line(["tile", f"run={tmp_path / 'whole'}", *words])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    newest = checkpoints.newest(tmp_path / "again")
    assert newest is not None
    shutil.rmtree(newest)
    run_command_line(["tile", f"run={tmp_path / 'again'}", *words])
    assert metrics(tmp_path / "again") == metrics(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "again"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(theirs[f"gram_teacher.{key}"], theirs[f"teacher.encoder.{key}"])
    records = read_metrics(tmp_path / "whole")
    assert all(record["gram"] > 0 for record in records if "loss" in record)
    looks = [record for record in records if "patch_cosine" in record]
    assert [record["step"] for record in looks] == [2, 4]
    assert all({"neighbour_cosine", "class_patch_cosine"} <= record.keys() for record in looks)
