"""Ending a run because the machine is wanted back: the ranks agree, save, and have the job start again.

    signal → noted (`pretrain.run.signals`) → end of the batch: ranks agree → checkpoint, waited for → requeue, or exit code 75

A job of SLURM is requeued by its first rank, and all ranks stay until they are killed: a rank that ended would end the
job. Where torchrun started the processes, or nobody did, the run ends; the same command continues it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from data.fault import Fault
from pretrain.run import signals
from pretrain.run.across_ranks import gloo_group, world_size
from pretrain.run.launched import rank
from pretrain.run.progress import say

# EX_TEMPFAIL of sysexits.h: not done, try again. 128 + signal is what a shell says of a process that was killed..
TRY_AGAIN = 75
INTERRUPTED = 128 + signal.SIGINT
# A job in another state has its fate from SLURM already: cancelled, which it must stay, or preempted, which requeues
# it.
REQUEUED_FROM = ("RUNNING", "TIMEOUT")
ASKING_SLURM = 120.0  # seconds that it may take at the most
NOT, REQUEUED, IN_VAIN = range(3)  # whether SLURM starts a job again


class Preemption:
    """The ranks' common answer to the question whether to end. Every rank makes one, and asks it at the same
    moments."""

    def __init__(self) -> None:
        # A group of its own: gloo, so that asking doesn't wait for a GPU.
        self.group = gloo_group()

    def asked(self) -> signal.Signals | None:
        """The signal that some rank has on note, the same on every rank, or None."""
        number = self._largest(signals.noted())
        return signal.Signals(number) if number else None

    def requeue(self, first_rank: bool, in_vain: bool = False) -> bool:
        """Have SLURM start this job again, where one is and will; the same answer on every rank.

        ``in_vain``: no checkpoint was made since this start, so the next one would begin at the same place. Raises
        Fault then, on every rank, unless SLURM has decided by itself: with the same time limit it would be so for ever.
        """
        if not _slurm_starts_again():
            return False
        signals.forget()  # the next one comes from SLURM, to end what it starts again
        return _is_requeued(self._largest(_requeue(os.environ["SLURM_JOB_ID"], in_vain) if first_rank else NOT))

    def _largest(self, number: int) -> int:
        if world_size() == 1:
            return number
        value = torch.tensor(number, device="cpu")
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return int(value)


@contextmanager
def ending_when_asked(run: Path) -> Iterator[None]:
    """What comes before the ranks meet (a survey of slides, say) ends with this process where `signals.heed` says so.

    The first rank says it, and has SLURM start the job again, unless that would come no further. Raises Fault then.
    """
    try:
        yield
    except signals.Asked as asked:
        if first := not rank():
            say(f"{run}: stopped by {asked.signal.name} before its first step; the same command continues")
        requeued = False
        if asked.signal != signal.SIGINT and _slurm_starts_again():
            signals.forget()
            if first:
                requeued = _is_requeued(_requeue(os.environ["SLURM_JOB_ID"], in_vain=not asked.kept))
            else:  # whose end would be the job's, before the first has asked for another
                end = time.monotonic() + ASKING_SLURM
                while not signals.noted() and time.monotonic() < end:
                    time.sleep(0.5)
        leave(requeued, 0, asked.signal)


def leave(requeued: bool, local_rank: int, asked: int = signal.SIGTERM) -> None:
    """End this process, or wait for SLURM to end it; after Ctrl-C with the code that a shell expects of it.

    One process a machine tells with its exit code; of the others any code but 0 would be taken for a crash.
    """
    while requeued and not signals.noted():
        time.sleep(0.5)
    code = INTERRUPTED if asked == signal.SIGINT else TRY_AGAIN
    sys.exit(code if local_rank == 0 else 0)


def _slurm_starts_again() -> bool:
    """Whether this is a job of SLURM that nothing else starts again."""
    return "SLURM_JOB_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def _is_requeued(answer: int) -> bool:
    if answer == IN_VAIN:
        raise Fault(
            "out of time with no checkpoint made, and so it would be again, so this job isn't put back into the queue:"
            " give it more, launch.time=."
        )
    return answer == REQUEUED


def _requeue(job: str, in_vain: bool) -> int:
    shown = _scontrol("show", "job", "--oneliner", job)
    words = shown.split()
    state = next((word.removeprefix("JobState=") for word in words if word.startswith("JobState=")), "")
    if state not in REQUEUED_FROM:
        say(f"SLURM job {job} is {state or f'not known ({shown})'}: not asking for it to be started again")
        return NOT
    if "Requeue=0" in words:
        say(
            f"SLURM will not start job {job} again, as it was submitted; one that follows it, or the same command,"
            " continues"
        )
        return NOT
    if in_vain:
        return IN_VAIN
    answer = _scontrol("requeue", job)
    say(f"SLURM will not start job {job} again: {answer}" if answer else f"SLURM will start job {job} again")
    return NOT if answer else REQUEUED


def _scontrol(*words: str) -> str:
    """What ``scontrol`` says, on either stream; nothing where it did as asked."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip() or ("" if done.returncode == 0 else f"exit code {done.returncode}")
