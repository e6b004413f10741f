"""Runs that are killed and preempted at random moments, again and again, and must end as if nothing had been.

    python tests/soak.py [kills=30] [preemptions=20] [seed=0]

A tiny tile run is SIGKILLed ``kills`` times, half of them in one process and half in two, every second time aimed into
a save; then one in two processes gets SIGUSR1, SIGUSR2 or SIGTERM ``preemptions`` times, one in four while it starts.
The signal goes to one rank or to every process. After every kill the newest published checkpoint must load; after every
preemption the exit code must be 75 and the checkpoint that of the last step on record. At the end losses and weights
are those of an uninterrupted run on as many processes, bit for bit. Each line is an event; the last is JSON. Exit code
1 where anything differed.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.run import checkpoints
from pretrain.run.metrics import read_metrics
from pretrain.run.preemption import TRY_AGAIN
from tests.data.shards.tile_folders import write_tiles
from tests.pretrain.training.test_tile_training import CLOCK, TINY

ROOT = Path(__file__).resolve().parents[1]
HUNG = 900.0  # seconds, for a machine that does other things besides; everything here takes a few
SETTINGS = ["objective.centring=centre", "objective.spread=kde", "model.drop_path=0.3", "trainer.accumulate=2"]


def steps(run: Path) -> int:
    """Steps on record."""
    return max((line["step"] for line in read_metrics(run)), default=0)


def saved(run: Path) -> int:
    """The step of the newest published checkpoint."""
    newest = checkpoints.newest(run)
    return checkpoints.read_state(newest)["step"] if newest else 0


def half_written(run: Path) -> set[tuple[str, int]]:
    """Names and times of last change of unpublished checkpoints: what an earlier kill left behind changes no more."""
    found = set()
    for path in checkpoints.folder(run).glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def catches(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_rank(process: int) -> bool:
    """Whether it was started as one of several ranks; a loader, which is forked, has not been given a rank."""
    return b"\0LOCAL_RANK=" in Path(f"/proc/{process}/environ").read_bytes()


def alive(group: int) -> list[int]:
    """The processes of a group that are not merely waiting to be reaped (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


@dataclass
class Run:
    """One run on disk, and the command that starts it."""

    folder: Path
    shards: Path
    steps: int
    processes: int

    def start(self) -> "Job":
        words = [f"run={self.folder}", f"data.shards={self.shards}", *TINY, *SETTINGS]
        words += [f"optim.steps={self.steps}", f"trainer.devices={self.processes}"]
        with (self.folder.with_suffix(".log")).open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pretrain", "tile", *words],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return Job(process, self)

    def end(self) -> None:
        """Let it run to its end."""
        job = self.start()
        assert job.wait() == 0, f"{self.folder} ended with {job.process.returncode}: see {self.folder}.log"

    def record(self) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in line.items() if name not in CLOCK} for line in read_metrics(self.folder)
        ]

    def equals(self, other: "Run") -> bool:
        """Whether every figure of every step and every weight is the same."""
        ours, theirs = (checkpoints.read_network(checkpoints.newest(run.folder), "") for run in (self, other))  # type: ignore[arg-type]
        return self.record() == other.record() and all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@dataclass
class Job:
    """A started command, its ranks being the processes that it starts, or itself where it starts none."""

    process: subprocess.Popen[bytes]
    run: Run

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait for something; False where the command ended before it."""
        began = time.monotonic()
        while not happened():
            if self.process.poll() is not None:
                return False
            if time.monotonic() - began > HUNG:
                self.end()
                raise TimeoutError(f"hung: see {self.run.folder}.log")
            time.sleep(0.003)
        return True

    def wait(self) -> int:
        """Wait until all its processes have ended, by themselves; the first one's exit code."""
        self.until(lambda: False)
        began = time.monotonic()
        while left := alive(self.process.pid):
            if time.monotonic() - began > HUNG:
                self.end()
                raise TimeoutError(f"hung after the first process had ended: {left}, see {self.run.folder}.log")
            time.sleep(0.02)
        return self.process.returncode

    def end(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> list[int]:
        return [child for child in children(self.process.pid) if is_rank(child)] or [self.process.pid]

    def send(self, number: int, target: str, draw: random.Random) -> None:
        ranks = self.ranks()
        if target == "all":
            os.killpg(self.process.pid, number)
        else:
            os.kill(ranks[0] if target == "first" else draw.choice(ranks), number)


def kill(run: Run, aimed: bool, draw: random.Random) -> bool:
    """Start ``run`` and kill it after a few steps, ``aimed`` into a save; whether that left a half-written
    checkpoint."""
    stale = half_written(run.folder)
    job = run.start()
    more = steps(run.folder) + draw.randint(1, 4)
    assert job.until(lambda: steps(run.folder) >= more and saved(run.folder) > 0), "it ended before the kill"
    if aimed:
        job.until(lambda: bool(half_written(run.folder) - stale))
    time.sleep(draw.uniform(0, 0.04 if aimed else 0.3))
    target = draw.choice(["all", "one"]) if run.processes > 1 else "all"
    job.send(signal.SIGKILL, target, draw)
    job.wait()
    half = [name for name, _ in half_written(run.folder) - stale]
    newest = checkpoints.newest(run.folder)
    assert newest is not None
    assert all(tensor.isfinite().all() for tensor in checkpoints.read_network(newest, "").values())
    say(
        f"SIGKILL to {target} of {run.processes} at step {steps(run.folder)}: newest {newest.name}, half-written {half}"
    )
    return bool(half)


def soak_kills(run: Run, count: int, draw: random.Random) -> dict[str, float]:
    """Kill ``run`` so many times; how many of the kills found a half-written checkpoint."""
    return {"kills": count, "kills_inside_a_save": sum(kill(run, number % 2 == 0, draw) for number in range(count))}


def preempt(run: Run, starting: bool, draw: random.Random) -> float:
    """Start ``run`` and ask it to end, after a few steps or while ``starting``; seconds until it had (0 while
    starting)."""
    job, target = run.start(), draw.choice(["first", "one", "all"])
    asking = draw.choice([signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
    more = saved(run.folder) + draw.randint(1, 4)
    if starting:
        time.sleep(draw.uniform(0, 6))
        job.until(lambda: all(catches(rank, asking) for rank in job.ranks()))  # past the interpreter's own start
    else:
        assert job.until(lambda: steps(run.folder) >= more), "it ended before the signal"
        time.sleep(draw.uniform(0, 0.3))
    began = time.monotonic()
    job.send(asking, target, draw)
    code = job.wait()
    took = time.monotonic() - began
    when = "while starting" if starting else f"at step {steps(run.folder)}"
    say(f"{asking.name} to {target} {when}: exit code {code} after {took:.1f} s, newest step-{saved(run.folder):08d}")
    assert code == TRY_AGAIN, f"see {run.folder}.log"
    assert saved(run.folder) == steps(run.folder)
    return 0.0 if starting else took


def soak_preemptions(run: Run, count: int, draw: random.Random) -> dict[str, float]:
    """Preempt ``run`` so many times; the longest time from a signal to the end."""
    slowest = max(preempt(run, number % 4 == 3, draw) for number in range(count))
    return {"preemptions": count, "slowest_preemption_seconds": round(slowest, 1)}


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main() -> None:
    given = {"kills": 30, "preemptions": 20, "seed": 0}
    given |= {key: int(value) for key, value in (word.split("=") for word in sys.argv[1:])}
    draw, began, found = random.Random(given["seed"]), time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        shards = write_tiles(folder / "shards", [40, 37])
        # Long enough: a kill or a preemption lets through four steps at most, and some that come before it is noticed.
        alone, pair = given["kills"] // 2, given["kills"] - given["kills"] // 2
        length = 10 + 8 * max(alone, pair, given["preemptions"])
        for processes, kills, preemptions in ((1, alone, 0), (2, pair, given["preemptions"])):
            reference = Run(folder / f"reference{processes}", shards, length, processes)
            reference.end()
            say(f"the uninterrupted run on {processes}: {length} steps")
            for kind, count, soak in (("killed", kills, soak_kills), ("preempted", preemptions, soak_preemptions)):
                if count:
                    run = Run(folder / f"{kind}{processes}", shards, length, processes)
                    for key, value in soak(run, count, draw).items():
                        found[key] = found.get(key, 0) + value
                    run.end()
                    assert run.equals(reference), f"the {kind} run on {processes} differs from the uninterrupted one"
                    say(f"the {kind} run on {processes} equals it bit for bit")
    print(json.dumps(found | {"equal": True, "seed": given["seed"], "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
