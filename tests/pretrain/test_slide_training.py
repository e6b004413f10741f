"""Runs of ``pretrain slide``: any number of processes, any interruption, the same losses and the same judgement."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.embeddings import EmbeddingWriter
from data.keyed import rng

ROOT = Path(__file__).resolve().parents[2]
GROUP = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"}
SMALL = ["model.width=32", "model.depth=2", "objective.decoder_width=32", "objective.decoder_depth=1", "data.batch_size=4", "data.field_cells=0"]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides of 8 × 6 tiles, 16-wide embeddings that vary smoothly over the slide."""
    folder = tmp_path_factory.mktemp("embeddings")
    cells = np.stack(np.meshgrid(np.arange(8), np.arange(6)), axis=-1).reshape(-1, 2)
    with EmbeddingWriter(folder, 16, "made up", "0" * 16) as writer:
        for number in range(6):
            draw = rng(number, "slide")
            waves = np.sin(cells @ draw.normal(0, 0.7, (2, 16)) + draw.uniform(0, 6, 16))
            writer.add(f"slide{number}", waves.astype(np.float32), cells * 256, 256.0, 0.5)
    return folder


def start(run: Path, store: Path, *settings: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    words = [
        f"run={run}",
        f"data.embeddings={store}",
        "optim.steps=12",
        "trainer.checkpoint_every=4",
        "trainer.accelerator=cpu",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", "slide", *words, *SMALL, *settings],
        cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output


def metrics(run: Path) -> list[dict[str, Any]]:
    timing = {"slides_per_second", "data_wait"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def test_two_processes_and_a_killed_run_end_like_one_uninterrupted_process(store: Path, tmp_path: Path) -> None:
    one, two = start(tmp_path / "one", store), start(tmp_path / "two", store, "trainer.devices=2")
    finish(one)
    finish(two)
    expected = metrics(tmp_path / "one")
    assert [line["step"] for line in expected if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in expected if "r2_neighbours" in line] == [4, 8, 12]
    for found, line in zip(metrics(tmp_path / "two"), expected, strict=True):
        assert found == pytest.approx(line, rel=1e-4, abs=1e-5)

    killed = start(tmp_path / "killed", store)
    record = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (record.exists() and len(record.read_text().splitlines()) >= 7):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finish(start(tmp_path / "killed", store))
    assert metrics(tmp_path / "killed") == expected
