"""The first error of any rank is the one to show: what the others say after it is that somebody is gone.

Every launch of several processes has a folder of logs, and names it in the environment. A process that fails leaves its
error there at once,

    <run>/logs/<job>/  rank-00000.log …                                    what each process said
                       error-<attempt>-<seconds>-rank-00003.txt            its own error
                       follows-<attempt>-<seconds>-rank-00000.txt          a consequence: the connection to another rank broke

so that sorted by name the last attempt's first error comes first among that attempt's.
"""

import os
import platform
import re
import time
import traceback
from pathlib import Path

from data.fault import Fault
from data.redaction import redacted
from pretrain.run.launched import environment_number, rank

LOGS = "PRETRAIN_LOGS"
"""The variable of the environment that names the folder; unset where one process runs alone on a console."""

# What is said by gloo, by NCCL and by torch's store where another process of the group is gone.
BROKEN = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused) by peer|Broken pipe|Socket Timeout|TCPStore", re.IGNORECASE
)


def attempt() -> int:
    """How often the same launch was started again before: by torchrun after a failure, by SLURM from its queue."""
    return environment_number("TORCHELASTIC_RESTART_COUNT", environment_number("SLURM_RESTART_COUNT", 0))


def is_consequence(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    if isinstance(error, Fault):
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or (isinstance(error, RuntimeError) and bool(BROKEN.search(str(error))))


def record(error: BaseException) -> Path | None:
    """Leave this process's error in the folder of logs; returns its file, or None where there is no such folder."""
    if LOGS not in os.environ:
        return None
    folder, now, number = Path(os.environ[LOGS]), time.time(), rank() or 0
    kind = "follows" if is_consequence(error) else "error"
    message = str(error) if isinstance(error, Fault) else redacted(traceback.format_exception_only(error)[-1].strip())
    trace = error.trace if isinstance(error, Fault) else redacted("".join(traceback.format_exception(error)))
    clock = time.strftime("%H:%M:%S", time.localtime(now))
    path = folder / f"{kind}-{attempt():03d}-{now:.6f}-rank-{number:05d}.txt"
    node = os.environ.get("SLURMD_NODENAME", platform.node())  # by the name that launch.exclude= takes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{trace}pretrain: rank {number} on {node} failed first, at {clock}: {message}\n")
    except OSError:  # a full disk, say: the error is still to be said on this process's own stream
        return None
    return path


def first(folder: Path, since: float = 0.0) -> Path | None:
    """The file of the first error in a folder of logs, of the last attempt since then, or None where nobody left
    one."""
    found = []
    for path in folder.glob("*-rank-*.txt"):
        kind, number, seconds = path.name.split("-")[:3]
        if float(seconds) >= since and path.stat().st_size:
            found.append((-int(number), kind, float(seconds), path))
    return min(found)[-1] if found else None


def said_by_first_rank(file: Path) -> bool:
    """Whether the error in a file, or the same in other words of time and place, is one that rank 0 met as well."""
    kind, number = file.name.split("-")[:2]
    return any(_message(other) == _message(file) for other in file.parent.glob(f"{kind}-{number}-*-rank-00000.txt"))


def _message(file: Path) -> str:
    return re.sub(r"^.* failed first, at [\d:]+: ", "", file.read_text().splitlines()[-1])
