"""The same function over many jobs in several processes, in which a job may fail or even crash without taking the
others along."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

from data.fault import Fault
from data.files import Refused

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Job], Result], jobs: list[Job], workers: int
) -> Iterator[tuple[Job, Result | Fault]]:
    """Yield (job, its result or the Fault it raised) as they are done, in no particular order.

    Other exceptions, and Refused, are raised here. A job whose process dies (a crash inside a C library, out of memory)
    yields a Fault as well: after a crash the unfinished jobs that were running are repeated one by one, each in its own
    process, to learn whose fault it was. With one worker or one job everything runs in this process. Workers end when
    this process does, however it ends, and at once where it wants no more: at Ctrl-C, or when the iterator is closed.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, _attempt(function, job)
        return
    waiting, suspects = list(reversed(jobs)), []
    while waiting:
        with _pool(min(workers, len(waiting))) as pool:
            running: dict[Future[Result | Fault], Job] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * workers:
                        job = waiting[-1]
                        running[pool.submit(_attempt, function, job)] = job
                        waiting.pop()
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                suspects = list(running.values())
        for job in suspects:
            with _pool(1) as pool:
                try:
                    yield job, pool.submit(_attempt, function, job).result()
                except BrokenProcessPool:
                    yield job, Fault("the process that worked on it crashed, in openslide or for lack of memory")
        suspects = []


def _attempt(function: Callable[[Job], Result], job: Job) -> Result | Fault:
    try:
        return function(job)
    except Refused:
        raise
    except Fault as fault:
        return fault


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes to work in, which are left in the middle of their jobs where the block is."""
    theirs, ours = multiprocessing.Pipe(duplex=False)  # nothing is sent: that its end closes is the word
    # spawn: a forked child would inherit threads' locks, and whatever the parent has loaded
    context = multiprocessing.get_context("spawn")
    with theirs, ours, ProcessPoolExecutor(workers, context, _end_when_told, (theirs,)) as pool:
        try:
            yield pool
        except BaseException:
            ours.close()
            raise


def _end_when_told(told: Connection) -> None:
    """Leave as soon as the parent says so or is gone: a killed parent can't tell its workers to stop. Ctrl-C is the
    parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel, told])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
