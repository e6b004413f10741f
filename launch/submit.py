"""Handing a script to sbatch, and saying how to follow the job."""

import shutil
import subprocess
from pathlib import Path

from data.fault import Fault
from data.files import make_folder, write_whole
from pretrain.run.progress import say


def submit(path: Path, text: str, logs: Path, dependency: str | None = None) -> str:
    """Write the script, submit it, to wait for other jobs than it says itself where ``dependency`` is given, and return
    the job's number. Raises Fault where SLURM isn't here or refuses it."""
    if shutil.which("sbatch") is None:
        raise Fault(
            "sbatch is not here: launch=slurm is for a cluster's login node; launch.dry_run=true prints the script,"
            " launch=local runs here."
        )
    write_whole(path, text, private=True)  # set-up lines may say what is nobody else's business
    make_folder(logs)  # SLURM doesn't, and a job whose log can't be opened ends without a word
    waiting = [f"--dependency={dependency}"] if dependency else []
    answer = subprocess.run(["sbatch", "--parsable", *waiting, str(path)], capture_output=True, text=True)
    if answer.returncode:
        problem = " ".join(answer.stderr.split()).removeprefix("sbatch: error: ")
        raise Fault(f"sbatch refused {path}: {problem}")
    return answer.stdout.strip().partition(";")[0]


def announce(number: str, name: str, script: Path, logs: Path, array: int = 0) -> None:
    """Print the job's number for scripts, and how to follow it for people."""
    one = f"{number}_0" if array else number
    said = f"{array} jobs" if array else "job"
    say(f"submitted {said} {number} ({name})")
    say(f"  script   {script}")
    say(f"  queue    squeue --jobs={number}")
    say(f"  logs     {logs / one}/, and the job's own in {logs / one}.log")
    say(f"  follow   tail -F {logs / one}.log {logs / one}/rank-00000.log")
    say(f"  cancel   scancel {number}")
    print(number, flush=True)


def announce_chain(numbers: list[str]) -> None:
    """Print the numbers of the further jobs of a chain, and say what they are, if there are any."""
    if len(numbers) > 1:
        say(
            f"  chain    {' → '.join(numbers)}: each starts when the one before it has ended, and ends at once where"
            " the run is done"
        )
        say(f"  cancel   scancel {' '.join(numbers)}")
        print("\n".join(numbers[1:]), flush=True)
