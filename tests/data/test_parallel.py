"""Jobs in processes: results, faults and crashes stay apart, and no process outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.fault import Fault
from data.parallel import in_processes

ROOT = Path(__file__).resolve().parents[2]

JOBS = """
import os, sys, time
from data.fault import Fault
from data.parallel import in_processes

def work(job):
    if job == "crash":
        os.kill(os.getpid(), 11)
    if job == "fault":
        raise Fault("this one is bad")
    if job == "bug":
        raise KeyError("ours")
    if job == "sleep":
        print(os.getpid(), flush=True)
        time.sleep(60)
    assert "torch" not in sys.modules
    return job * 2

if __name__ == "__main__":
    for job, result in in_processes(work, sys.argv[1:], 2):
        print(job, result if isinstance(result, str) else f"{type(result).__name__}: {result}", flush=True)
"""


def start(folder: Path, *jobs: str) -> subprocess.Popen[str]:
    script = folder / "jobs.py"
    script.write_text(JOBS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(script), *jobs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        process_group=0,
    )


def test_a_fault_or_a_crash_costs_its_own_job_only(tmp_path: Path) -> None:
    jobs = ["a", "crash", "b", "fault", "c", "d", "e"]
    out, _ = start(tmp_path, *jobs).communicate(timeout=60)
    results = dict(line.split(" ", 1) for line in out.splitlines())
    assert {job: results[job] for job in "abcde"} == {job: job * 2 for job in "abcde"}
    assert results["fault"] == "Fault: this one is bad"
    assert results["crash"].startswith("Fault: the process that worked on it crashed")
    assert len(out.splitlines()) == len(jobs)


def test_our_own_bugs_are_not_hidden(tmp_path: Path) -> None:
    process = start(tmp_path, "bug", "a")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "KeyError: 'ours'" in err


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "sleep", "sleep")
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(workers)


def test_who_closes_the_iterator_waits_for_no_job() -> None:
    results = in_processes(time.sleep, [0.0, 60.0, 60.0], 2)
    assert next(results) == (0.0, None)
    began = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 30


def gone(processes: list[int]) -> bool:
    """Whether all of them end within some seconds."""
    deadline = time.monotonic() + 20
    while any(alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(alive(process) for process in processes)


@pytest.mark.parametrize("to", ["everybody", "the parent alone"])
def test_ctrl_c_ends_workers_in_the_middle_of_their_jobs(to: str, tmp_path: Path) -> None:
    process = start(tmp_path, "sleep", "sleep", "a")
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    os.killpg(process.pid, signal.SIGINT) if to == "everybody" else process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)  # the jobs take twice as long
    assert gone(workers) and "KeyboardInterrupt" in said and "SpawnProcess" not in said  # a worker's own traceback


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_worker_runs_here() -> None:
    def fail(job: int) -> int:
        if job == 2:
            raise Fault("two")
        return os.getpid()

    results = dict(in_processes(fail, [1, 2, 3], 1))
    assert results[1] == results[3] == os.getpid() and str(results[2]) == "two"
    with pytest.raises(ZeroDivisionError):
        list(in_processes(lambda job: 1 // job, [0], 1))
