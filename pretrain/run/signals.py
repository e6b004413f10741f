"""Signals that ask a run to end, noted and nothing more: what to do about one is decided at the end of a batch.

SLURM sends whichever it was told to (USR1, USR2) before a time limit, and TERM when it preempts or cancels; all three
mean the same here, and so do a person's Ctrl-C and a terminal that is closed (HUP); who presses it twice doesn't want
to wait. Work inside a handler deadlocks a sharded run, whose ranks are then at different places. This module imports
nothing heavy, so that it can listen before PyTorch's import, which takes seconds.
"""

import os
import signal
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

ASKING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
SOON = b"\npretrain: stopping after this step, and what is done is kept; Ctrl-C again stops at once\n"

_noted = 0


class Asked(Exception):
    """Work was left because a signal asks for it; ``kept``: what is done of it needn't be done again."""

    def __init__(self, number: int, kept: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal, self.kept = signal.Signals(number), kept


def listen() -> None:
    """From now on the signals are noted instead of ending the process. Call it from the main thread."""
    for number in ASKING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, _note)
    signal.signal(signal.SIGINT, _note_first)
    hear()


def hear() -> None:
    """From now on the signals arrive: a process that is started as one of several is deaf until then."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)


def ignore() -> None:
    """From now on the signals do nothing: what is left is to exit, and one of them would make a failure of a run that
    is done.

    Python itself puts every handler back to the default before it ends, which takes seconds with PyTorch.
    """
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def listening() -> Iterator[None]:
    """`listen` for a while; afterwards the signals do what they did before, and none is on note."""
    before = {number: signal.getsignal(number) for number in (*ASKING, signal.SIGINT)}
    listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        forget()


def noted() -> int:
    """The number of the last signal that asked, or 0."""
    return _noted


def heed(kept: bool = False) -> None:
    """Raise `Asked` where a signal is on note: for work that this process does alone, before the ranks have met."""
    if _noted:
        raise Asked(_noted, kept)


def heeding(items: Iterable[T], kept: bool = False) -> Iterator[T]:
    """``items``, with `heed` between them; a generator of them is closed at once, and what works for it ended."""
    with closing(items) if isinstance(items, Generator) else nullcontext():
        for item in items:
            yield item
            heed(kept)


def forget() -> None:
    """Wait for a new signal."""
    global _noted
    _noted = 0


def _note(number: int, _: FrameType | None) -> None:
    global _noted
    _noted = number


def _note_first(number: int, frame: FrameType | None) -> None:
    if _noted == signal.SIGINT:
        # Not KeyboardInterrupt, which Lightning would answer with an exit code of its own.
        os._exit(130)
    _note(number, frame)
    os.write(2, SOON)
