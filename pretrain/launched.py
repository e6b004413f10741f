"""What whoever started this process says of it: whether it is one of several, and which."""

import os


def rank() -> int | None:
    """This process's number among those that run one command together, or None where it is the only one."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return None
