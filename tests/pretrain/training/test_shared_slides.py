"""``data.processes_per_slide``: processes that share every slide's tokens train as one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.training.wavy_slides import write_wavy_slides

ROOT = Path(__file__).resolve().parents[3]
GROUP = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"}
SMALL = [
    "model.width=32",
    "model.depth=2",
    "objective.decoder_width=32",
    "objective.decoder_depth=1",
    "data.batch_size=4",
    "data.field_cells=0",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five slides of 7 × 6 tiles, 16-wide embeddings that vary smoothly over the slide."""
    return write_wavy_slides(tmp_path_factory.mktemp("embeddings"), 5, columns=7, rows=6)


def train(run: Path, store: Path, *settings: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    words = [
        f"run={run}",
        f"data.embeddings={store}",
        "optim.steps=4",
        "optim.warmup_steps=4",
        "trainer.checkpoint_every=4",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "slide", *words, "trainer.accelerator=cpu", *SMALL, *settings],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    return done.returncode, done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    timing = {"slides_per_second", "data_wait", "peak_memory_gib"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


@pytest.mark.slow
def test_two_processes_that_share_every_slide_train_and_judge_like_one(store: Path, tmp_path: Path) -> None:
    for name, settings in (("one", []), ("shared", ["trainer.devices=2", "data.processes_per_slide=2"])):
        code, output = train(tmp_path / name, store, *settings)
        assert code == 0, output
    expected = metrics(tmp_path / "one")
    assert [line["step"] for line in expected if "loss" in line] == [1, 2, 3, 4]
    for found, line in zip(metrics(tmp_path / "shared"), expected, strict=True):
        assert found == pytest.approx(line, rel=1e-4, abs=1e-5)  # losses and gradient norms: nothing counts twice
