"""Signals that come to a process which only waits for others are told to these."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pretrain.run import signals

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def deafen() -> None:
    """Let processes that are started now begin deaf, until `passing_on`: who is told before it listens would die of it,
    and hears what came once it listens, or once it knows that it needn't."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.ASKING)


@contextmanager
def passing_on(tell: Callable[[list[int]], object]) -> Iterator[list[int]]:
    """Call ``tell`` with the signals that came so far, the newest last, as each comes; one that was noted before comes
    first."""
    told: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        told.append(number)
        tell(told)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ASKING)
    if number := signals.noted():  # while this process read the command line
        pass_on(number, None)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
