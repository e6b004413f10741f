"""What a run relies on outside of the machine: Weights & Biases, and SLURM."""

import shutil
import subprocess
from collections.abc import Callable, Mapping

from pretrain.doctor.finding import Finding, failed, passed, warned

Ask = Callable[[list[str]], str]


def answer(command: list[str]) -> str:
    """What a command prints. Raises OSError where it isn't there or fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"exit code {done.returncode}")
    return done.stdout


def wandb(mode: str, logged_in: Callable[[], bool]) -> list[Finding]:
    """Will W&B take the record of the run?"""
    if mode == "off":
        return [passed("wandb", "off: metrics.jsonl is the record")]
    if mode == "offline":
        return [passed("wandb", "offline: 'wandb sync' uploads it later")]
    if mode != "online":
        return [failed("wandb", f"wandb.mode is off, online or offline, not {mode!r}")]
    if logged_in():
        return [passed("wandb", "online, and logged in")]
    return [
        warned(
            "wandb",
            "wandb.mode=online and nobody is logged in: the run would be written offline; 'wandb login', or set"
            " WANDB_API_KEY",
        )
    ]


def slurm(
    environment: Mapping[str, str],
    partition: str | None,
    devices: int,
    nodes: int,
    ask: Ask = answer,
    there: Callable[[str], str | None] = shutil.which,
) -> list[Finding]:
    """Does the cluster answer, is the partition there and up, and is a job around this process what Lightning takes it
    for?"""
    if there("sbatch") is None:
        if partition is not None:
            return [
                failed(
                    "slurm",
                    f"partition={partition} is asked for and there is no sbatch here: run this on the cluster's login"
                    " node",
                )
            ]
        return [passed("slurm", "not on this machine")]
    try:
        lines = ask(["sinfo", "--noheader", "--format=%P|%a|%l|%D"]).splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        needed = partition is not None or "SLURM_JOB_ID" in environment
        why = str(error).splitlines()[0]
        return [
            (failed if needed else warned)(
                "slurm",
                f"sbatch is here and sinfo doesn't answer ({why}): is the controller up ('scontrol ping'), and"
                " SLURM_CONF the right one?",
            )
        ]
    partitions: dict[str, tuple[str, str, int]] = {}
    for line in lines:
        name, up, longest, size = line.split("|")
        partitions[name.rstrip("*")] = (up, longest, int(size))
    listed = ", ".join(f"{name} ({count} nodes, at most {limit})" for name, (_, limit, count) in partitions.items())
    found = []
    if partition is not None and partition not in partitions:
        found.append(failed("slurm", f"there is no partition {partition!r}; there are: {listed}"))
    elif partition is not None:
        state, _, count = partitions[partition]
        if state != "up":
            found.append(
                failed("slurm", f"partition {partition} is {state}: choose another, or ask the cluster's people")
            )
        elif count < nodes:
            found.append(
                failed(
                    "slurm",
                    f"partition {partition} has {count} nodes and trainer.nodes={nodes}: set it lower, or choose"
                    " another",
                )
            )
    return found + _job(environment, devices) or [passed("slurm", f"partitions: {listed}")]


def _job(environment: Mapping[str, str], devices: int) -> list[Finding]:
    """A job around this process: what would make Lightning count processes wrongly."""
    if "SLURM_JOB_ID" not in environment:
        return []
    if environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return [
            warned(
                "slurm",
                f"the job's name is {environment['SLURM_JOB_NAME']!r}, for which Lightning ignores SLURM: give it"
                " another with --job-name",
            )
        ]
    tasks = environment.get("SLURM_NTASKS_PER_NODE")
    if "SLURM_NTASKS" in environment and tasks is None:
        return [
            warned("slurm", "the job doesn't say --ntasks-per-node, which Lightning needs: set it to trainer.devices")
        ]
    if (
        tasks is not None
        and tasks != str(devices)
        and environment.get("SLURM_STEP_NUM_TASKS") != environment.get("SLURM_NNODES")
    ):
        return [
            warned(
                "slurm",
                f"--ntasks-per-node={tasks} and trainer.devices={devices}: a run needs one task for each of its"
                " processes, so make them equal",
            )
        ]
    return []
