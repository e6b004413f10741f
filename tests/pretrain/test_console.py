"""A run goes on where nobody hears it: its reader is gone, its terminal closed, its words find no room."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.console import Unfailing
from pretrain.run import checkpoints
from tests.pretrain.training.test_tile_training import GROUP, ROOT, STEPS, command, metrics, start


def test_what_cannot_be_said_is_dropped() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None:
            raise BrokenPipeError

    stream = Unfailing(Full())
    assert stream.write("words") == 5 and stream.isatty() is False
    stream.flush()


def test_a_reader_that_ends_does_not_end_the_run(tile_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    reading, writing = os.pipe()
    kept = {name: value for name, value in os.environ.items() if name not in GROUP}
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", *command(tile_shards, run)],
        cwd=ROOT,
        env=kept | {"OMP_NUM_THREADS": "1"},
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)
    os.close(reading)
    assert process.wait(timeout=90) == 0
    newest = checkpoints.newest(run)
    assert newest is not None and checkpoints.step_of(newest) == STEPS == len(metrics(run))


@pytest.mark.slow
def test_a_terminal_that_is_closed_leaves_a_checkpoint(tile_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(command(tile_shards, run, "optim.steps=100000", "trainer.checkpoint_every=100000"))
    record, end = run / "metrics.jsonl", time.monotonic() + 60
    while not (record.exists() and record.read_text().count("\n") >= 3):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGHUP" in output
    newest = checkpoints.newest(run)
    assert newest is not None and checkpoints.step_of(newest) == metrics(run)[-1]["step"]
