"""``launch=local``: here. One process runs in this one; several (``trainer.devices=2``, ``processes_per_slide=2`` of
'embed', ``processes=2`` of 'curate') are started and watched by it.

The watching process holds no part of the run: it passes signals on, ends the others when one fails, and says whose
error came first. Lightning would start them from the first rank, and kill that without a word when another dies.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data.fault import Fault
from launch import failures, ranks
from launch.launcher import Launcher, folder_of, python_arguments, run_here
from launch.passing_on import deafen, passing_on
from launch.processes import refuse_uneven, refuse_unshared, shared_by
from pretrain.run.launched import environment_number, is_step, started_together
from pretrain.run.preemption import TRY_AGAIN
from pretrain.settings.composition import Composed

INTERACTIVE = ("bash", "interactive")  # names of jobs that Lightning takes for a person's shell
TRAINING = ("tile", "slide")  # the doctor and plan take their settings, and are one process
GRACE_AFTER_A_FAILURE = 5.0  # seconds that the other ranks have to end by themselves after one has failed


@dataclass(kw_only=True)
class Local(Launcher):
    """This machine."""

    def launch(self, composed: Composed) -> None:
        training = composed.command in TRAINING
        if training:
            refuse_without_srun()
            composed.object()  # what is missing is said once, by this process
            refuse_uneven(composed, composed.tree.trainer.devices * composed.tree.trainer.nodes)
        if training and not is_a_rank():
            refuse_alone(composed.tree.trainer.nodes)
            count, nodes = composed.tree.trainer.devices, composed.tree.trainer.nodes
        elif not training and "LOCAL_RANK" not in os.environ:
            count, nodes = shared_by(composed), 1
            if count > 1:
                refuse_unshared(composed)
                count = 1 if started_together() == count else count  # a single task of srun's starts its own
        else:
            count, nodes = 1, 1
        if count < 2:
            run_here(composed)
            return
        run_together(composed, count, nodes, folder_of(composed).resolve() / "logs" / "local")


def is_a_rank() -> bool:
    """Whether something else has started this process as one of several: torchrun, srun, or this module."""
    by_srun = bool(os.environ.get("SLURM_NTASKS")) and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE
    return "LOCAL_RANK" in os.environ or by_srun


def refuse_without_srun() -> None:
    """Raise Fault in an allocation of several tasks where nobody started them: Lightning would take this process for
    one of them."""
    tasks = environment_number("SLURM_NTASKS", 1)
    if (
        tasks > 1
        and not is_step()
        and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE
        and "LOCAL_RANK" not in os.environ
    ):
        raise Fault(
            f"this is a SLURM allocation of {tasks} tasks, and srun didn't start this process: put srun before the"
            " command, let launch=slurm write the job, or 'unset SLURM_NTASKS' to train with this one."
        )


def refuse_alone(nodes: int) -> None:
    """Raise Fault where a run of several nodes would wait for others that nobody starts."""
    if nodes > 1 and not {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise Fault(
            f"trainer.nodes={nodes} needs somebody who starts it on every node: launch=slurm or launch=torchrun."
        )


def run_together(composed: Composed, count: int, nodes: int, logs: Path) -> None:
    """Run the command as ``count`` processes on each of ``nodes``, here those of this one. Where one fails, say the
    first error and exit with its code."""
    node, began = environment_number("NODE_RANK", 0), time.time()
    theirs, ours = os.pipe()  # nothing is written: that its end closes tells the ranks that this process is gone
    cores = len(os.sched_getaffinity(0))
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        **os.environ,
        "WORLD_SIZE": str(count * nodes),
        "NODE_RANK": str(node),
        failures.LOGS: str(logs),
        ranks.PARENT: str(theirs),
    }
    command = [sys.executable, *python_arguments(composed, composed.words)]
    processes: list[subprocess.Popen] = []

    def tell(told: list[int]) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(told[-1])

    deafen()
    for i in range(count):
        place = {"LOCAL_RANK": str(i), "RANK": str(node * count + i)}
        processes.append(
            # A group of its own: a terminal's Ctrl-C goes to this process alone, and from here once to each rank.
            subprocess.Popen(
                command, env=environment | place, pass_fds=(theirs,), stdin=subprocess.DEVNULL, process_group=0
            )
        )
    try:
        with passing_on(tell) as told:
            code, culprit = wait_for_all(processes, told)
    finally:
        os.close(ours)
        os.close(theirs)
    if signal.SIGINT in told:
        raise KeyboardInterrupt
    if code:
        if code != TRY_AGAIN and not told:
            say_first_error(logs, began, culprit + node * count, code)
        sys.exit(code if code > 0 else 128 - code)


def wait_for_all(processes: list[subprocess.Popen], told: list[int]) -> tuple[int, int]:
    """Wait for all to end; the code and the place of the first that failed, or zeros.

    After a failure, or a second Ctrl-C, those that linger are killed: a process may wait for ever for another that is
    gone.
    """
    failed, deadline = 0, float("inf")
    while any([process.poll() is None for process in processes]):
        time.sleep(0.1)
        codes = [process.poll() for process in processes]
        if deadline == float("inf") and (any(codes) or told.count(signal.SIGINT) > 1):
            failed = next((i for i, code in enumerate(codes) if code), 0)
            deadline = time.monotonic() + GRACE_AFTER_A_FAILURE
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
    ends = [process.wait() for process in processes]
    if not ends[failed]:
        failed = next((i for i, code in enumerate(ends) if code), 0)
    return ends[failed], failed


def say_first_error(logs: Path, since: float, culprit: int, code: int) -> None:
    """Say the first error of any rank, unless rank 0 has said it on this console already."""
    file = failures.first(logs, since)
    if file is not None and (file.name.startswith("error") or code > 0):
        if not failures.said_by_first_rank(file):
            print(file.read_text(), end="", file=sys.stderr)
    elif code < 0:
        print(
            f"pretrain: rank {culprit} was killed by {signal.Signals(-code).name}"
            f"{' (by the system, if memory ran out)' if code == -signal.SIGKILL else ''}; the same command continues.",
            file=sys.stderr,
        )
    print(f"pretrain: the logs of all ranks are in {logs}", file=sys.stderr)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
