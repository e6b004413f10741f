"""What whoever started this process says of it: whether it is one of several, and which."""

import os
from collections.abc import Mapping

from data.fault import Fault


def rank() -> int | None:
    """This process's number among those that run one command together, or None where it is the only one."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name):
            return environment_number(name, 0)
    return None


def is_step() -> bool:
    """Whether srun started this process; the steps of a job's own script and of its shells have numbers near 2³²."""
    step = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < 2**32 - 16


def started_together() -> int:
    """How many processes were started to run one command, by torchrun, by this project, or by srun; 1 where nobody
    did."""
    return environment_number("WORLD_SIZE", environment_number("SLURM_STEP_NUM_TASKS", 1) if is_step() else 1)


def environment_number(name: str, default: int) -> int:
    """A variable of the environment that holds a number; unset or empty: ``default``. Raises Fault for anything
    else."""
    value = os.environ.get(name) or str(default)
    if not value.isdigit():
        raise Fault(
            f"{name}={value!r} in the environment is no number: 'unset {name}', or start this with srun or torchrun."
        )
    return int(value)


def way_out_of_own_gpus(environment: Mapping[str, str]) -> str | None:
    """What to do where SLURM lets each task of a job see some of its node's GPUs alone; None elsewhere."""
    options = {
        "SLURM_GPUS_PER_TASK": "gpus-per-task",
        "SLURM_NTASKS_PER_GPU": "ntasks-per-gpu",
        "SLURM_GPU_BIND": "gpu-bind",
    }
    given = [f"--{option}" for name, option in options.items() if environment.get(name, "none") != "none"]
    if not given:
        return None
    return (
        f"this job gives each task GPUs of its own ({', '.join(given)}); give --gpus-per-node in its place, so that a"
        " process sees all of its node"
    )
