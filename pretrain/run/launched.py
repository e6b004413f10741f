"""What whoever started this process says of it: whether it is one of several, and which."""

import os

from data.fault import Fault


def rank() -> int | None:
    """This process's number among those that run one command together, or None where it is the only one."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name):
            return environment_number(name, 0)
    return None


def environment_number(name: str, default: int) -> int:
    """A variable of the environment that holds a number; unset or empty: ``default``. Raises Fault for anything
    else."""
    value = os.environ.get(name) or str(default)
    if not value.isdigit():
        raise Fault(
            f"{name}={value!r} in the environment is no number: 'unset {name}', or start this with srun or torchrun."
        )
    return int(value)
