"""A real SLURM with two nodes on this machine, in a folder of its own: Debian's packages, no system service, no
cgroups."""

import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")


class Unavailable(Exception):
    """Why there can be no SLURM here."""


def install() -> None:
    """Put SLURM's programs on this machine unless they are there. Raises Unavailable where that can't be."""
    # Test processes that run side by side: one installs, the others wait.
    with (Path(tempfile.gettempdir()) / "install-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if all(shutil.which(program) for program in ("slurmctld", "slurmd", "sbatch", "munged")):
            return
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise Unavailable("SLURM is not installed, and only root can install it, with apt-get")
        quietly = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", "-qq", *words], env=quietly, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise Unavailable(f"apt-get {words[0]} failed: {done.stderr.strip()[-300:]}")


def settings(folder: Path, ports: list[int]) -> str:
    """slurm.conf: two nodes of six cores, whatever this machine has, and two partitions, of which jobs in ``high``
    preempt those in ``low``."""
    host = socket.gethostname()
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=6
PartitionName=low Nodes=n[1-2] PriorityTier=1 Default=YES
PartitionName=high Nodes=n[1-2] PriorityTier=10
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = sorted(one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """A running one; ``environment`` lets SLURM's commands find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *words: str) -> str:
        """What one of SLURM's commands answers."""
        done = subprocess.run(words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self, job: str) -> list[str]:
        """The states of a job, or of an array's jobs: PENDING, RUNNING, COMPLETED, …"""
        return self.ask("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").split()

    def restarts(self, job: str) -> int:
        """How often a job was put back into the queue."""
        text = self.ask("scontrol", "show", "job", job)
        return int(text.partition("Restarts=")[2].split()[0])

    def wait(self, job: str, *wanted: str, seconds: float = 180) -> None:
        """Until all of a job is in one of the wanted states. An AssertionError says what happened instead."""
        end = time.monotonic() + seconds
        while set(found := self.states(job)) - set(wanted):
            ended = set(found) & {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
            assert not ended and time.monotonic() < end, (
                f"job {job} is {found}, not {wanted}\n{self.ask('scontrol', 'show', 'job', job)}"
            )
            time.sleep(0.3)


@contextmanager
def running() -> Iterator[Cluster]:
    """Install if need be, start, wait for both nodes, and stop everything in the end."""
    install()
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise Unavailable(
            f"SLURM needs this machine's name {socket.gethostname()} to have an address: {error}"
        ) from error
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(settings(folder, free_ports(3)))
    (folder / "cgroup.conf").write_text(
        "CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
    )
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    cluster = Cluster(folder)
    munged = [
        "munged",
        "--force",
        "--foreground",
        f"--key-file={folder}/munge.key",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
    ]
    daemons = [munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    processes = []
    try:
        with (folder / "daemons.log").open("w") as log:
            for words in daemons:
                if words[0] == "slurmctld":
                    _until(lambda: (folder / "munge.socket").exists(), 20, folder)
                environment = {**os.environ, **cluster.environment}
                processes.append(
                    subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
        _until(lambda: _nodes(cluster) == ["idle", "idle"], 60, folder)
        yield cluster
    finally:
        if len(processes) == len(daemons):
            subprocess.run(
                ["scancel", "--user=root"], env={**os.environ, **cluster.environment}, timeout=30, check=False
            )
            end = time.monotonic() + 15
            while _jobs(cluster) and time.monotonic() < end:
                time.sleep(0.2)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(20)
        shutil.rmtree(folder)


def _nodes(cluster: Cluster) -> list[str]:
    answer = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"],
        env={**os.environ, **cluster.environment},
        capture_output=True,
        text=True,
    )
    return answer.stdout.split()


def _jobs(cluster: Cluster) -> str:
    answer = subprocess.run(
        ["squeue", "--noheader"], env={**os.environ, **cluster.environment}, capture_output=True, text=True
    )
    return answer.stdout.strip()


def _until(condition, seconds: float, folder: Path) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(f"{path.name}: {path.read_text()[-500:]}" for path in folder.glob("*.log"))
            raise Unavailable(f"SLURM doesn't start here:\n{logs}")
        time.sleep(0.1)
