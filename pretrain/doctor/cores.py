"""Has each process of a run the cores that it needs? One that trains and its loader's threads share them."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pretrain.doctor.finding import Finding, passed, warned


def check_cores(
    processes: int, threads: int | None, gpu: bool, environment: Mapping[str, str], here: float
) -> list[Finding]:
    """Cores of each of a node's ``processes`` against the ``data.threads`` of its loader (None: a loader without that
    setting, of one); ``here`` is `usable_cores`.

    On a GPU the process itself needs a core more: one that starts kernels late leaves the GPU idle.
    """
    each = cores_of_each(processes, environment, here)
    needed = (threads or 1) + (1 if gpu else 0)
    says = f"{each:.3g} core{'' if each == 1 else 's'} for each of {processes} processes"
    if each >= needed:
        return [passed("cores", says)]
    feeds = "one to feed its GPU, " if gpu else ""
    loader = "one to read" if threads is None else f"data.threads={threads} to decode"
    lower = "" if threads in (None, 1) else ", set data.threads lower"
    return [
        warned(
            "cores",
            f"{says}, and each needs {needed} ({feeds}{loader}): ask for more (launch.cpus_per_task={needed}, docker"
            f" run --cpus={processes * needed}){lower}, or trainer.devices lower",
        )
    ]


def cores_of_each(processes: int, environment: Mapping[str, str], here: float) -> float:
    """Cores for each of a node's ``processes``: a share of what the SLURM job has there, and no more than srun gives a
    task; outside of a job a share of ``here``.

    The doctor of a job is one task a node, so its own affinity says nothing of the run's tasks.
    """
    # As SLURM writes it, 72(x2),36: of the nodes the one with the fewest.
    of_job = re.findall(r"(?:^|,)(\d+)", environment.get("SLURM_JOB_CPUS_PER_NODE", ""))
    share = (min(map(int, of_job)) if of_job else here) / processes
    of_task = environment.get("SLURM_CPUS_PER_TASK", "")
    return min(share, float(of_task) if of_task.isdecimal() else math.inf)


def usable_cores() -> float:
    """Cores that this process may use: those that it may be scheduled on, or less where its control group gets less of
    their time."""
    return min(len(os.sched_getaffinity(0)), cpu_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text()))


def cpu_quota(root: Path, groups: str) -> float:
    """Cores' worth of time that a process's control group and those above it get, infinity for no limit.

    ``groups``: what ``/proc/self/cgroup`` says, lines ``number:controllers:/place``; those of version 2 name no
    controllers. Source: the kernel's admin-guide, cgroup-v2 (``cpu.max``) and scheduler/sched-bwc (``cpu.cfs_*``).
    """
    least = math.inf
    for controllers, place in (line.split(":", 2)[1:] for line in groups.splitlines()):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        own = top / place.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                least = min(least, _quota_of(folder))
    return least


def _quota_of(folder: Path) -> float:
    """Of one control group; one that isn't visible here (a container sees its own alone) has no limit that is."""
    if (folder / "cpu.max").is_file():
        quota, period = (folder / "cpu.max").read_text().split()
    elif (folder / "cpu.cfs_quota_us").is_file():
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
