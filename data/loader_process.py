"""The loader's process: however it ends, the trainer ends with one sentence, and when the trainer ends nothing of it is
left.

    loader:  batch, batch, … ──▶ trainer            what goes wrong there travels as the last item, a Fault
    killed (out of memory, a full /dev/shm) ──▶     torch raises in the trainer, wherever that is: `ended_by`; or the
                                                    next batch can't be had, since what it lies in is asked of its maker
    trainer ends, whatever by ──▶ killed            it ignores the signals that ask the trainer to end, and so that of its own exit

A batch travels in shared memory where that has room for what is on its way, else as bytes through a pipe.
"""

import errno
import gc
import multiprocessing
import os
import pickle
import re
import resource
import signal
import traceback
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from data.fault import Fault

SHARED_MEMORY = Path("/dev/shm")
FEW_FILES = {errno.EMFILE, errno.ENFILE}
KILLED = re.compile(
    r"DataLoader worker \(pid\(?s?\)? (\d+)\) (?:is killed by signal: (\w+(?: \w+)?)|exited unexpectedly)"
)


class LoaderProcess(DataLoader):
    """``batches``, made in a process of their own; `end` it when nothing more is wanted of it."""

    def __init__(self, batches: IterableDataset, pin_memory: bool, through_pipe: bool = False) -> None:
        super().__init__(
            Handed(batches, through_pipe),
            batch_size=None,
            num_workers=1,
            prefetch_factor=2,
            pin_memory=pin_memory and not through_pipe,
            worker_init_fn=_settle,
        )
        self.through_pipe, self._pinned = through_pipe, pin_memory
        self._processes: set[BaseProcess] = set()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before = set(multiprocessing.active_children())
        # The new process is a copy of this one, without its threads. Were it to tidy up what lies about here (a group
        # of processes, say, that waits for its threads to end), it would crash.
        gc.collect()
        gc.freeze()
        try:
            batches = super().__iter__()
        finally:
            gc.unfreeze()
        self._processes = set(multiprocessing.active_children()) - before
        return self._received(batches)

    def _received(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (OSError, EOFError, RuntimeError) as error:
                raise self._ending() or error from error
            yield self._unpacked(batch) if self.through_pipe else batch

    def _unpacked(self, packed: bytes) -> Any:
        batch = pickle.loads(packed)
        if not self._pinned or isinstance(batch, Fault):
            return batch
        return [part.pin_memory() for part in batch] if isinstance(batch, list) else batch.pin_memory()

    def _ending(self) -> Fault | None:
        """Why the process is no more, where something killed it."""
        for process in self._processes:
            process.join(timeout=1)  # the connection breaks a moment before
            if process.exitcode:
                how = signal.strsignal(-process.exitcode) if process.exitcode < 0 else f"exit code {process.exitcode}"
                return _killed(process.pid, how)
        return None

    def end(self) -> None:
        """Kill the process: it holds nothing that could be lost."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = set()


class Handed(IterableDataset[Any]):
    """The items of ``batches``, pickled where they go through a pipe, and as the last one a Fault for any error of
    theirs."""

    def __init__(self, batches: IterableDataset, through_pipe: bool) -> None:
        self.batches, self.through_pipe = batches, through_pipe

    def __iter__(self) -> Iterator[Any]:
        for item in self._items():
            yield pickle.dumps(item, pickle.HIGHEST_PROTOCOL) if self.through_pipe else item

    def _items(self) -> Iterator[Any]:
        try:
            yield from self.batches
        except Exception as error:
            yield fault_of(error)


def fault_of(error: Exception) -> Fault:
    """What an error in the loader process comes to; the traceback of code that isn't ours to explain goes with it."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, OSError) and error.errno in FEW_FILES:
        return Fault(
            f"the loader may open no more files ({error}; the limit is"
            f" {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}); raise it, 'ulimit -n 65536', or write fewer, larger"
            " shards."
        )
    if isinstance(error, MemoryError):
        return Fault("the loader has no memory left; give the job more, or lower data.batch_size or data.window.")
    message = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, OSError):
        return Fault(f"the loader can't read on ({message}); mend that, and the same command continues.")
    return Fault(
        f"the loader failed with {message}; its traceback is above, and the same command continues once that is"
        " mended.",
        trace="".join(traceback.format_exception(error)),
    )


def ended_by(error: BaseException) -> Fault | None:
    """The Fault to raise in place of torch's error where that says that a loader process was killed, else None."""
    found = KILLED.search(str(error)) if isinstance(error, RuntimeError) else None
    return _killed(found[1], found[2]) if found else None


def _killed(process: object, how: str | None) -> Fault:
    ways_out = {
        "Killed": "out of memory, most likely: give the job more, or lower data.batch_size or data.window",
        "Bus error": (
            f"{SHARED_MEMORY} is full: give the container more (docker run --shm-size=8g), or lower data.batch_size"
        ),
    }
    way_out = ways_out.get(how or "", "see the system's log for why")
    return Fault(
        f"the loader process {process} was ended by {how or 'no word'} ({way_out}); the same command continues."
    )


def shared_memory_room() -> int | None:
    """Bytes of shared memory that are free on this machine, or None where it has none of Linux's kind."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def open_more_files() -> None:
    """Let this process open as many files as it may ask for: the ordinary limit is far below the one that is
    allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _settle(_: int) -> None:
    # SLURM signals every process of a job step; only the trainer may decide what a signal means.
    for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    open_more_files()
