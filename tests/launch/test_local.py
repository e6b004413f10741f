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
from launch.entry import run_command_line
from launch.local import wait_for_all
from launch.torchrun import run_and_tell
from pretrain.run import checkpoints
from pretrain.run.metrics import read_metrics
from pretrain.run.preemption import TRY_AGAIN
from tests.data.shards.tile_folders import write_tiles
from tests.pretrain.training.test_tile_training import ROOT, assert_close, command, start


def python(program: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], text=True, **options)  # type: ignore[call-overload]


def test_the_first_that_fails_is_told_from_those_that_are_ended_after_it() -> None:
    # The second waits for ever for the third, as a rank does in a collective.
    processes = [python("pass"), python("import time; time.sleep(600)"), python("raise SystemExit(3)")]
    assert wait_for_all(processes, []) == (3, 2)
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL, 3]


def test_nobody_failed() -> None:
    assert wait_for_all([python("pass"), python("pass")], []) == (0, 0)


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


def steps_of(run: Path) -> int:
    """How many steps are in a run's record, which has lines of other things too."""
    return sum("loss" in line for line in read_metrics(run))


@pytest.mark.slow
def test_torchrun_starts_all_again_where_one_is_killed(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    run_command_line(command(shards, tmp_path / "here"))
    run = tmp_path / "run"
    process = start(command(shards, run, "launch=torchrun", "launch.processes_per_node=2"))
    while steps_of(run) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(min(of_rank(run, 1)), signal.SIGKILL)  # its loader, which came after it, has the same environment
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "exitcode: -9" in output and "resuming after step" in output
    assert_close(run, tmp_path / "here")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_is_told_once_and_only_what_its_ranks_answer_with_a_checkpoint(
    number: signal.Signals, tmp_path: Path
) -> None:
    # In torchrun's place a process that notes what it is sent and ends on its own time; it signals who started it,
    # twice.
    program = f"""
import os, signal, time
came = []
for one in (signal.SIGINT, signal.SIGTERM):
    signal.signal(one, lambda number, _: came.append(signal.Signals(number).name))
for _ in range(2):
    os.kill(os.getppid(), {int(number)})
    time.sleep(0.5)
open({str(tmp_path / "came")!r}, "w").write(" ".join(came))
raise SystemExit(1)
"""
    before = signal.getsignal(number)
    code, told = run_and_tell([sys.executable, "-c", program], dict(os.environ))
    assert (code, told) == (1, [number, number])
    assert (tmp_path / "came").read_text() == "SIGTERM"
    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_its_ranks_with_a_checkpoint_and_starts_none_again(tmp_path: Path) -> None:
    shards = write_tiles(tmp_path / "shards", [40, 37])
    run_command_line(command(shards, tmp_path / "here"))
    run = tmp_path / "run"
    words = command(shards, run, "launch=torchrun", "launch.processes_per_node=2", "trainer.checkpoint_every=100")
    for number, code, steps in ((signal.SIGUSR1, TRY_AGAIN, 1), (signal.SIGINT, 130, 3)):
        process = start(words)
        while steps_of(run) < steps:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code and "Traceback" not in output, output
        assert of_rank(run, 0) == of_rank(run, 1) == []
        newest = checkpoints.newest(run)
        assert newest is not None and checkpoints.step_of(newest) == steps_of(run) < 6
        assert f"stopped by SIGTERM after step {checkpoints.step_of(newest)}" in output
    process = start(words)
    assert process.wait(300) == 0
    assert_close(run, tmp_path / "here")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tile", "data.shards=s", "trainer.devices=3"], "data.lanes=4 can't be shared evenly by 3 processes"),
        (["tile", "data.shards=s", "trainer.devices=2", "trainer.nodes=2", "trainer.shard_size=3"], "trainer.shard_size=3 does not divide the 4 processes."),
        (["tile", "data.shards=s", "objective.group_size=3"], "data.batch_size=64 is not a multiple of objective.group_size=3"),
        (["tile", "data.shards=s", "trainer.accumulate=3"], "data.batch_size=64 can't be shared by 1 processes × trainer.accumulate=3"),
        (["slide", "data.embeddings=e", "trainer.accumulate=3"], "can't be shared evenly by 1 processes × trainer.accumulate=3"),
        (["slide", "data.embeddings=e", "trainer.devices=4", "data.processes_per_slide=3"], "data.processes_per_slide=3 doesn't divide the run's 4 processes"),
        (["slide", "data.embeddings=e", "trainer.devices=4", "data.processes_per_slide=4", "model.heads=6", "model.width=48"], "data.processes_per_slide=4 doesn't divide model.heads=6"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [False, True])
def test_what_so_many_processes_cannot_share_is_a_mistake_of_the_command_line(
    words: list[str],
    sentence: str,
    rank: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rank:  # whoever started it
        monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit) as ended:
        run_command_line([*words, f"run={tmp_path / 'run'}", "trainer.accelerator=cpu"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said and said.count("pretrain: ") == 1, said
    assert not (tmp_path / "run").exists()
