"""Runs of LeJEPA: the same steps in any number of micro-batches, stochastic depth included, and resumed bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch

from launch.entry import run_command_line
from pretrain.encoders.loading import load_encoder
from pretrain.encoders.run_checkpoint import find_checkpoint, teacher
from pretrain.run import checkpoints
from tests.pretrain.training.test_tile_training import TINY, assert_close, metrics, weights

pytestmark = pytest.mark.usefixtures("one_thread")

LEJEPA = [
    *(word for word in TINY if not word.startswith(("objective.prototypes", "objective.ibot", "objective.bottleneck"))),
    "objective=lejepa",
    "objective.projection=16",
    "objective.slices=64",
    "model.drop_path=0.3",
    "optim.steps=4",
    "watch.every=2",
]


def words(run: Path, tile_shards: Path, *settings: str) -> list[str]:
    return ["tile", f"run={run}", f"data.shards={tile_shards}", *LEJEPA, *settings]


def test_a_run_takes_the_same_steps_in_two_parts_and_resumes_bit_for_bit(tile_shards: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_command_line(words(tmp_path / "one", tile_shards))
    run_command_line(words(whole, tile_shards, "trainer.accumulate=2"))
    assert_close(whole, tmp_path / "one")
    shutil.copytree(whole, again)
    newest = checkpoints.newest(again)
    assert newest is not None
    shutil.rmtree(newest)
    run_command_line(words(again, tile_shards, "trainer.accumulate=2"))
    assert metrics(again) == metrics(whole)
    ours, theirs = weights(again), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    network, _ = teacher(find_checkpoint(whole))  # there is none: the one network is what is embedded and exported
    assert all(torch.equal(theirs[f"encoder.{name}"], tensor) for name, tensor in network.state_dict().items())
    assert load_encoder(str(whole), "cpu").embed(torch.zeros(1, 40, 40, 3, dtype=torch.uint8)).isfinite().all()
