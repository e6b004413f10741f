"""``trainer.stalled_minutes``: a process that makes no step for so long ends, and says where each of its threads stood.

    step, batch of an evaluation ── beat ──▶ the clock begins anew
    nothing for so long          ──▶ stack traces of all threads, exit code 70

A rank that waits for another which will never answer, for a disk or for a source of data holds its machines until
somebody looks. The thread that watches needs Python's lock; where the stalled one never gives that back, faulthandler's
own timer, which needs none, ends the process a little later, with the traces on the console and exit code 1.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback

HUNG = 70  # EX_SOFTWARE of sysexits.h
THREAD_PATIENCE = (
    30.0  # seconds for which the watching thread may be kept from running before faulthandler's timer takes over
)


class Watchdog:
    """Watches from ``with`` on, unless ``minutes`` is None."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self._over = threading.Event()
        self._last = time.monotonic()

    def beat(self) -> None:
        """There is progress."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.minutes is not None:
            self.beat()
            threading.Thread(target=self._watch, args=(60 * self.minutes,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, limit: float) -> None:
        while not self._over.is_set():
            left = self._last + limit - time.monotonic()
            if left <= 0:
                self._end()
            faulthandler.dump_traceback_later(left + THREAD_PATIENCE, exit=True, file=sys.__stderr__ or sys.stderr)
            if self._over.is_set():  # between the two lines above
                faulthandler.cancel_dump_traceback_later()
            self._over.wait(min(left, THREAD_PATIENCE / 2))

    def _end(self) -> None:
        sys.stderr.write(
            f"{thread_stacks()}pretrain: no step for {self.minutes:g} minutes (trainer.stalled_minutes), so this"
            " process ends; above is where each of its threads stood, and the same command continues from the newest"
            " checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(HUNG)


def thread_stacks() -> str:
    """Where each thread of this process stands, the main one last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == main)
    return "".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}\n" for ident, frame in frames
    )
