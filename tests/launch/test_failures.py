"""Which error is shown when several processes run one command and one of them fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.fault import Fault, Notice
from launch import failures
from launch.entry import show_warning
from pretrain.run.launched import rank
from tests.data.shards.tile_folders import write_tiles
from tests.pretrain.training.test_tile_training import GROUP, ROOT, TINY, metrics


def record_as(monkeypatch: pytest.MonkeyPatch, logs: Path, rank: int, error: BaseException, attempt: int = 0) -> None:
    monkeypatch.setenv(failures.LOGS, str(logs))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    try:
        raise error
    except type(error) as raised:
        assert failures.record(raised) is not None


def test_an_error_comes_before_its_consequences_even_when_they_are_written_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"
    )
    record_as(monkeypatch, tmp_path, 0, lost)
    record_as(monkeypatch, tmp_path, 2, lost)
    record_as(monkeypatch, tmp_path, 1, ZeroDivisionError("division by zero"))
    record_as(monkeypatch, tmp_path, 3, ValueError("later"))
    found = failures.first(tmp_path)
    assert found is not None
    lines = found.read_text().splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("pretrain: rank 1 on ")
    assert lines[-1].endswith("ZeroDivisionError: division by zero")
    # The script of a job has only a shell: sorted by name it is the first too.
    assert sorted(path.name for path in tmp_path.iterdir())[0] == found.name


def test_consequences_are_shown_where_nobody_left_an_error_and_older_attempts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_as(monkeypatch, tmp_path, 1, ValueError("of the first attempt"))
    record_as(monkeypatch, tmp_path, 0, RuntimeError("NCCL error: remote process exited"), attempt=1)
    found = failures.first(tmp_path)
    assert found is not None and "remote process exited" in found.read_text()
    assert failures.first(tmp_path, since=time.time() + 1) is None


def test_a_fault_is_one_line_and_is_not_said_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_as(monkeypatch, tmp_path, 1, Fault("the disk is full."))
    found = failures.first(tmp_path)
    assert (
        found is not None and found.read_text().count("\n") == 1 and found.read_text().endswith(": the disk is full.\n")
    )
    assert not failures.said_by_first_rank(found)
    record_as(monkeypatch, tmp_path, 0, Fault("the disk is full."))
    assert failures.said_by_first_rank(found)


def test_a_process_that_is_alone_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(failures.LOGS, raising=False)
    assert failures.record(ValueError("x")) is None


def failing_run(tmp_path: Path, shards: Path, rank: int) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of a small run whose objective fails on one rank in its third step."""
    kept = {name: value for name, value in os.environ.items() if name not in GROUP}
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAILING_RANK": str(rank)}
    small = [word for word in TINY if not word.startswith(("objective.", "data.crops.local"))]
    words = [
        "tile",
        f"run={tmp_path / 'run'}",
        f"data.shards={shards}",
        "recipe=small_mae",
        "objective._target_=tests.launch.failing_step.Failing",
        *small,
        "optim.frozen_last_layer_steps=0",
    ]
    return words, environment


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles") / "shards", [40, 37])


@pytest.mark.slow
def test_the_last_lines_name_the_rank_that_failed_and_not_those_that_lost_it(shards: Path, tmp_path: Path) -> None:
    words, environment = failing_run(tmp_path, shards, rank=1)
    ended = subprocess.run(
        [sys.executable, "-m", "pretrain", *words, "trainer.devices=2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    logs = tmp_path / "run" / "logs" / "local"
    assert ended.returncode == 1, ended.stderr
    *_, error, where = ended.stderr.splitlines()
    assert error.startswith("pretrain: rank 1 on ") and error.endswith("ZeroDivisionError: the third step of this rank")
    assert where == f"pretrain: the logs of all ranks are in {logs}"
    assert ended.stderr.count("Traceback") == 1 and "gloo" not in ended.stderr
    assert "ZeroDivisionError" in (logs / "rank-00001.log").read_text()
    assert (logs / "rank-00000.log").read_text() in ended.stderr  # the console is the first rank's, and a copy is kept
    assert len(metrics(tmp_path / "run")) == 2


def test_an_error_that_found_no_room_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_as(monkeypatch, tmp_path, 1, ValueError("it had room"))
    (tmp_path / "error-000-0.000001-rank-00000.txt").touch()  # a full disk makes names and no content
    found = failures.first(tmp_path)
    assert found is not None and "it had room" in found.read_text()
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert failures.record(ValueError("x")) is None


@pytest.mark.parametrize("value", ["", "2(x2)"])
def test_a_variable_that_is_no_number_is_unset_or_a_sentence(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", value)
    monkeypatch.delenv("RANK", raising=False)
    if value:
        with pytest.raises(Fault, match=r"SLURM_PROCID='2\(x2\)' in the environment is no number"):
            rank()
    else:
        assert rank() is None


def test_a_notice_is_a_line_and_anothers_warning_what_python_makes_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    show_warning(Notice("2 names lead to one file"), Notice, "file.py", 7)
    assert capsys.readouterr().err == "2 names lead to one file\n"
    show_warning(UserWarning("old"), UserWarning, "file.py", 7, line="")
    assert "file.py:7: UserWarning: old" in capsys.readouterr().err
