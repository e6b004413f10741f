"""What a process does that is one of several: its words go to a file, and it doesn't outlive what started it."""

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from launch import failures
from pretrain.run.launched import rank

PARENT = "PRETRAIN_PARENT"
"""The variable of the environment with the number of a pipe whose other end is held by the process that started the
ranks."""


class Copied:
    """A stream whose lines also go to a file; a terminal's progress bar, which writes one line over and over,
    doesn't."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        if "\r" not in text:
            with suppress(OSError):
                self.file.write(text)
                self.file.flush()
        return self.stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def settle() -> None:
    """Take the place that the environment gives this process among the ranks, if it is one.

    The first rank keeps its console and copies it to its log; the others write to theirs only. Under SLURM srun does
    that.
    """
    number = rank()
    if number is None or failures.LOGS not in os.environ:
        return
    if PARENT in os.environ:
        threading.Thread(target=_die_with, args=(int(os.environ.pop(PARENT)),), daemon=True).start()
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ:
        return
    folder = Path(os.environ[failures.LOGS])
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"rank-{number:05d}.log").open("a", buffering=1)
    if number == 0:
        sys.stdout, sys.stderr = Copied(sys.stdout, file), Copied(sys.stderr, file)  # type: ignore[assignment]
    else:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _die_with(pipe: int) -> None:
    """End this process when the other end of the pipe is closed: a rank without the others would wait for ever, or go
    on alone."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGKILL)
