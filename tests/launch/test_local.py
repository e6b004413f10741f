"""Several processes of this machine: who tells them, who outlives whom, and who starts them again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import ranks
from launch.entry import main
from launch.local import watch
from pretrain.run_folder import read_metrics
from tests.data.tile_folders import write_tiles
from tests.pretrain.test_tile_training import ROOT, assert_close, command, start


def python(program: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], text=True, **options)  # type: ignore[call-overload]


def test_the_first_that_fails_is_told_from_those_that_are_ended_after_it() -> None:
    # The second waits for ever for the third, as a rank does in a collective.
    processes = [python("pass"), python("import time; time.sleep(600)"), python("raise SystemExit(3)")]
    assert watch(processes, []) == (3, 2)
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL, 3]


def test_nobody_failed() -> None:
    assert watch([python("pass"), python("pass")], []) == (0, 0)


def test_a_rank_does_not_outlive_what_started_it(tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    program = "from launch import ranks; ranks.settle(); import time; print('here', flush=True); time.sleep(600)"
    environment = os.environ | {
        "RANK": "1",
        "PRETRAIN_LOGS": str(tmp_path),
        ranks.PARENT: str(theirs),
        "PYTHONPATH": str(ROOT),
    }
    rank = python(program, env=environment, pass_fds=(theirs,))
    os.close(theirs)
    log, end = tmp_path / "rank-00001.log", time.monotonic() + 60
    while not (log.exists() and log.read_text() == "here\n"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert rank.poll() is None
    os.close(ours)
    assert rank.wait(30) == -signal.SIGKILL


def of_rank(run: Path, rank: int) -> list[int]:
    """The processes of a rank of a run under torchrun."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # which has ended meanwhile
            environment = (process / "environ").read_bytes().split(b"\0")
            if {f"PRETRAIN_LOGS={run / 'logs' / 'torchrun'}".encode(), f"RANK={rank}".encode()} <= set(environment):
                found.append(int(process.name))
    return found


@pytest.mark.slow
def test_torchrun_starts_all_again_where_one_is_killed(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    main(command(shards, tmp_path / "here"))
    run = tmp_path / "run"
    process = start(command(shards, run, "launch=torchrun", "launch.processes_per_node=2"))
    while len(read_metrics(run)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(min(of_rank(run, 1)), signal.SIGKILL)  # its loader, which came after it, has the same environment
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "resuming after step" in output or "Signal 9" in output
    assert_close(run, tmp_path / "here")
