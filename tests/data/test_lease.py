"""A lease: one holder, whoever else tries at the same moment; given back by every end, and taken from the silent
only."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from data import files, lease
from data.fault import Fault
from data.lease import Holder, Lease, alone, once, take

ROOT = Path(__file__).resolve().parents[2]
HOLD = (
    "import sys, time; from pathlib import Path; from data.lease import take; take(Path(sys.argv[1])); print('held',"
    " flush=True); time.sleep(600)"
)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds ``tmp_path/.lease``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lease")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def elsewhere(path: Path, age: float = 0.0) -> Holder:
    """A lease of a process on another machine, whose last beat is ``age`` seconds old."""
    holder = replace(lease._me(), host="far", machine="away", job="17")
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age, time.time() - age))
    return holder


def test_who_lives_is_named_and_who_was_killed_is_followed_at_once(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    with pytest.raises(Fault, match=f"another run is writing to {tmp_path}: process {other.pid} on "), alone(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    began = time.monotonic()
    with alone(tmp_path) as held:
        assert not held.lost and time.monotonic() - began < 3
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_believed_while_it_beats_and_followed_when_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SILENCE", 1.0)
    path = tmp_path / ".lease"
    holder = elsewhere(path)
    beating = threading.Timer(0.4, lambda: os.utime(path))
    beating.start()
    assert take(path) == holder
    found = take(path)  # nothing beats any more
    assert isinstance(found, Lease)
    found.end()


def test_a_lease_of_long_ago_is_not_waited_for(tmp_path: Path) -> None:
    elsewhere(tmp_path / ".lease", age=3600)
    began = time.monotonic()
    found = take(tmp_path / ".lease")
    assert isinstance(found, Lease) and time.monotonic() - began < 2
    found.end()


def test_a_job_that_slurm_started_again_follows_itself_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(tmp_path / ".lease")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    found = take(tmp_path / ".lease")
    assert isinstance(found, Lease)
    found.end()


def test_a_holder_that_was_silent_and_followed_learns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.05)
    path = tmp_path / ".lease"
    silent = take(path)
    assert isinstance(silent, Lease)
    elsewhere(path)
    end = time.monotonic() + 5
    while not silent.lost:
        assert time.monotonic() < end
        time.sleep(0.02)
    silent.end()
    assert path.exists()  # which is the other's now


def _try(path: Path, where: str) -> None:
    found = take(path)
    if isinstance(found, Lease):
        (path.parent / f"won-{where}").touch()
        time.sleep(1.0)
        os._exit(0)


@pytest.mark.parametrize("before", ["nobody", "one that is gone"])
def test_of_many_that_try_at_once_one_holds_it(tmp_path: Path, before: str) -> None:
    path = tmp_path / ".lease"
    if before != "nobody":
        elsewhere(path, age=3600)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_try, args=(path, str(number))) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("won-*"))) == 1


def _make(path: Path, log: Path, fails: bool, together: Barrier) -> None:
    def make() -> None:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.5)
        if fails:
            raise Fault("the slide is gone")
        files.write_whole(path, "whole")

    together.wait()  # who comes when the others have failed makes it anew, as it should
    try:
        once(path, make)
    except Fault as fault:
        with log.open("a") as file:
            file.write(f"{fault}\n")


@pytest.mark.parametrize("fails", [False, True])
def test_what_all_need_is_made_by_one_and_its_error_is_everybodys(tmp_path: Path, fails: bool) -> None:
    path, log = tmp_path / "statistics.json", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    together = context.Barrier(6)
    processes = [context.Process(target=_make, args=(path, log, fails, together)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    said = log.read_text().splitlines()
    assert said.count("made") == 1
    assert said.count("the slide is gone") == (6 if fails else 0) and path.exists() is not fails


def test_without_hard_links_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with alone(tmp_path), pytest.raises(Fault, match="is writing to"), alone(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "forbidden"])
def test_a_lease_that_cannot_be_read_is_a_sentence(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lease"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_text("{}")

        def denied(path: Path) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(lease, "_last_beat", denied)
    with pytest.raises(Fault, match=r"\.lease, which says who writes to .*, can't be read"):
        lease.hold(tmp_path)


def test_who_is_asked_to_end_does_not_wait_for_a_silent_holder(tmp_path: Path) -> None:
    elsewhere = {**asdict(lease._me()), "host": "elsewhere", "machine": "another"}
    (tmp_path / ".lease").write_text(json.dumps(elsewhere))
    with pytest.raises(TimeoutError, match="told to stop"):
        lease.hold(tmp_path, while_waiting=_stop)


def _stop() -> None:
    raise TimeoutError("told to stop")


def test_who_is_asked_to_end_leaves_what_it_makes_or_waits_for_to_another(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    with pytest.raises(TimeoutError, match="told to stop"):
        once(path, _stop)  # as the maker
    other = take(tmp_path / ".statistics.json.lease")
    assert isinstance(other, Lease)  # nobody holds it now
    with pytest.raises(TimeoutError, match="told to stop"):
        once(path, lambda: None, while_waiting=_stop)  # while another makes it
    other.end()
    once(path, lambda: files.write_whole(path, "whole"))
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
