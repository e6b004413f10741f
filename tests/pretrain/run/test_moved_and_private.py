"""Runs go on where only the place of their data changed, or the token with which it is reached, which stands in no file
of theirs."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from launch.entry import run_command_line
from tests.data.flaky_server import serving
from tests.pretrain.training.test_slide_training import SMALL
from tests.pretrain.training.test_slide_training import words as slide_words
from tests.pretrain.training.test_tile_training import TINY, metrics, weights
from tests.pretrain.training.wavy_slides import write_wavy_slides

pytestmark = pytest.mark.usefixtures("one_thread")
FOUR = ["optim.steps=4", "optim.warmup_steps=1", "trainer.checkpoint_every=2"]


def lose_the_last_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000004")


@pytest.mark.slow
def test_a_run_on_signed_shards_goes_on_with_a_new_token_and_on_a_copy_and_keeps_no_token(
    tile_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ends = tmp_path / "run", []
    shutil.copytree(tile_shards, tmp_path / "disk" / "shards")

    def train(shards: str, *settings: str) -> None:
        words = ["tile", f"run={run}", f"data.shards='{shards}'", *TINY, *FOUR, *settings]
        monkeypatch.setattr(sys, "argv", ["pretrain", *words])
        run_command_line(words)
        ends.append((metrics(run), weights(run)))

    with serving(tmp_path / "disk") as server:
        for token in ("hunter1", "hunter2"):
            server.key = f"token={token}"
            train(f"{server.url}/shards?token={token}", "wandb.mode=offline")
            lose_the_last_checkpoint(run)
    train(f"{tmp_path}/disk/shards")
    for record, network in ends:
        assert record == ends[0][0] and all(torch.equal(value, ends[0][1][name]) for name, value in network.items())
    run_command_line(["report", f"run={run}"])
    run_command_line(["export", f"checkpoint={run}", f"out={tmp_path / 'encoder'}"])
    for path in (*run.rglob("*"), *(tmp_path / "encoder").rglob("*")):
        assert not path.is_file() or b"hunter" not in path.read_bytes(), path
    assert "hunter" not in "".join(capsys.readouterr())
    starts = (run / "provenance.json").read_text()
    assert starts.count("shards?token=***") == 2 and '"changes"' not in starts


def test_a_slide_run_goes_on_where_its_embeddings_were_moved(tmp_path: Path) -> None:
    run, store = tmp_path / "run", write_wavy_slides(tmp_path / "store", 6, columns=8, rows=6, fewer=6)
    run_command_line(slide_words(run, store, *SMALL, *FOUR))
    before = weights(run)
    lose_the_last_checkpoint(run)
    store.rename(tmp_path / "elsewhere")
    run_command_line(slide_words(run, tmp_path / "elsewhere", *SMALL, *FOUR))
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
