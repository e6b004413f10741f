"""``trainer.stalled_minutes``: a process that makes no step ends, and says where it stood."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.entry import run_command_line
from pretrain.run.watchdog import HUNG, Watchdog
from tests.pretrain.training.test_tile_training import ROOT, STEPS, command


def ended(program: str) -> subprocess.CompletedProcess[str]:
    program = f"import threading, time\nfrom pretrain.run import watchdog\n{program}"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_process_that_stands_still_ends_with_the_stacks_of_all_its_threads() -> None:
    done = ended("""
def waits_for_ever():
    threading.Event().wait()
threading.Thread(target=waits_for_ever, name="loader", daemon=True).start()
with watchdog.Watchdog(0.005):
    waits_for_ever()
""")
    assert done.returncode == HUNG == 70
    assert "Thread loader:" in done.stderr and "Thread MainThread:" in done.stderr
    assert done.stderr.count("in waits_for_ever") >= 2
    assert done.stderr.splitlines()[-1].startswith(
        "pretrain: no step for 0.005 minutes (trainer.stalled_minutes), so this process ends"
    )


def test_a_process_that_never_gives_pythons_lock_back_ends_too() -> None:
    done = ended("""
import ctypes
watchdog.THREAD_PATIENCE = 0.5
with watchdog.Watchdog(0.01):
    time.sleep(0.2)
    ctypes.PyDLL(None).sleep(60)  # holds the lock, as a deadlock in a library would
""")
    assert done.returncode == 1 and "Timeout" in done.stderr and "most recent call first" in done.stderr


def test_steps_and_batches_of_an_evaluation_are_progress() -> None:
    done = ended("""
with watchdog.Watchdog(0.01) as dog:
    for _ in range(8):
        time.sleep(0.15)
        dog.beat()
time.sleep(1)  # nobody watches any more
print("done")
""")
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_without_a_limit_nobody_watches() -> None:
    with Watchdog(None):
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_run_is_watched(tile_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats, beat = [], Watchdog.beat
    monkeypatch.setattr(Watchdog, "beat", lambda self: (beats.append(self.minutes), beat(self))[1])
    run_command_line(command(tile_shards, tmp_path / "run", "trainer.stalled_minutes=7"))
    assert len(beats) > STEPS and set(beats) == {7}
