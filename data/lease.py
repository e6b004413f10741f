"""One folder, one job: who writes to a folder says so in a file there, and goes on saying so while it lives.

    .lease           who holds the folder (host, process, job, since when), touched every `BEAT` seconds

Held until its holder ends, however that ends: a holder of this machine is looked for among its processes, of another
one its silence for `SILENCE` seconds tells that it is gone. So it outlives kill −9 and a reboot, and needs nothing of
the file system but that a file is created by one process only (no ``flock``, no links, no common clock).
"""

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data.fault import Fault
from data.files import create_whole, make_folder, write_whole

BEAT, SILENCE = 5.0, 60.0  # seconds
LEASE = ".lease"
"""The file in a folder that is held."""
LONG_AGO = 15 * 60.0  # seconds: a last beat before that needs no waiting, however wrong the clocks are

WhileWaiting = Callable[[], None]
"""Called again and again while waiting: raises what ends it."""


def nothing() -> None:
    """Waiting has no end but its own."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; ``key`` is unlike any other's."""

    host: str
    process: int
    began: str  # when that process began, in ticks since its machine did: numbers of processes are given out again
    machine: str  # its boot and its namespace of processes: another container's numbers mean nothing here
    job: str
    attempt: int
    since: str
    key: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}{f', job {self.job},' if self.job else ''} since {self.since}"

    def is_gone(self) -> bool | None:
        """Whether it has ended, as far as can be told from here; None where only its silence can tell."""
        if self.job and self.job == os.environ.get("SLURM_JOB_ID") and self.attempt < _attempt():
            return True  # SLURM has started this job again, after its end
        if self.host == platform.node() and self.machine == _machine():
            return _began(self.process) != self.began
        return None


def _me() -> Holder:
    job = os.environ.get("SLURM_JOB_ID", "")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    number = os.getpid()
    return Holder(platform.node(), number, _began(number), _machine(), job, _attempt(), since, secrets.token_hex(8))


def _attempt() -> int:
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def _began(process: int) -> str:
    """When a process of this machine began; empty where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node()


class Lease:
    """A lease that is held: its thread keeps saying so. `lost` where somebody took it, since nothing was heard of this
    process."""

    def __init__(self, path: Path, me: Holder) -> None:
        self.path, self.me, self.lost = path, me, False
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            holder = read_holder(self.path)
            if holder is not None and holder.key != self.me.key:
                self.lost = True
                return
            with suppress(OSError):  # tried again at the next beat
                os.utime(self.path)

    def end(self) -> None:
        """Give it up."""
        self._ended.set()
        holder = read_holder(self.path)
        if holder is not None and holder.key == self.me.key:
            self.path.unlink(missing_ok=True)


def read_holder(path: Path) -> Holder | None:
    """Who holds the lease at ``path``; None where nobody does, or its file is being written."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def held_by(folder: Path, name: str = LEASE) -> Holder | None:
    """Who holds a folder, as far as can be told without waiting: of another machine, whoever was heard of lately."""
    path = folder / name
    holder = read_holder(path)
    if holder is None or (gone := holder.is_gone()):
        return None
    try:
        silent = time.time() - (_last_beat(path) or 0)
    except OSError:
        return None
    return holder if gone is False or silent < SILENCE else None


def take(
    path: Path, enough: Callable[[], bool] = lambda: False, while_waiting: WhileWaiting = nothing
) -> Lease | Holder | None:
    """Take the lease at ``path``, or return who holds it: at once where that can be told, else after at most `SILENCE`
    seconds.

    None where ``enough`` says meanwhile that it is needed no more. Raises Fault where the file system refuses, and
    whatever ``while_waiting`` does.
    """
    me = _me()
    first, last_beat, unread, refusals = time.monotonic(), None, 0, 0
    while not enough():
        while_waiting()
        if create_whole(path, json.dumps(asdict(me))):
            return Lease(path, me)
        try:
            holder, beat = read_holder(path), _last_beat(path)
        except OSError as error:
            refusals += 1  # a network file system may refuse once
            if refusals > 20:
                raise Fault(
                    f"{path}, which says who writes to {path.parent}, can't be read ({error.strerror}): give another"
                    " folder, or have that file removed by whom it belongs to, if nobody writes there."
                ) from error
            time.sleep(0.05)
            continue
        if beat is None:
            continue  # it was given up between two looks
        if holder is None and unread < 20:
            unread += 1  # its content is one write away
            time.sleep(0.05)
            continue
        gone = holder.is_gone() if holder else None
        if gone is False:
            return holder
        if last_beat is not None and beat != last_beat and holder is not None:
            return holder  # it lives
        last_beat = beat
        if (gone or time.monotonic() - first > SILENCE or abs(time.time() - beat) > LONG_AGO) and _take_over(
            path, holder, me
        ):
            return Lease(path, me)
        time.sleep(0.2)
    return None


def _last_beat(path: Path) -> float | None:
    """When a lease was last touched, None where there is none. Raises OSError where that can't be told."""
    try:
        with path.open() as file:  # opening asks a network file system for what is true now
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _take_over(path: Path, holder: Holder | None, me: Holder) -> bool:
    """Put this process in the place of one that is gone; False where another was faster."""
    # Of all who found it gone one may: who makes this file.
    mark = path.with_name(f"{path.name}-after-{holder.key if holder else 'nobody'}")
    if not create_whole(mark, json.dumps(asdict(me))):
        by = read_holder(mark)
        if (by is not None and by.is_gone()) or abs(time.time() - (_last_beat(mark) or time.time())) > LONG_AGO:
            mark.unlink(missing_ok=True)  # who was about to is gone as well
        return False
    try:
        now = read_holder(path)
        if (now.key if now else None) != (holder.key if holder else None):
            return False
        write_whole(path, json.dumps(asdict(me)))
        return True
    finally:
        mark.unlink(missing_ok=True)


def hold(folder: Path, name: str = LEASE, doing: str = "another run", while_waiting: WhileWaiting = nothing) -> Lease:
    """Hold a folder until `Lease.end`. Raises Fault where ``doing`` is somebody else's there, with who it is."""
    make_folder(folder)
    lease = take(folder / name, while_waiting=while_waiting)
    if isinstance(lease, Holder):
        raise Fault(f"{doing} is writing to {folder}: {lease}; wait for it or end it, or give another folder.")
    assert lease is not None
    return lease


@contextmanager
def alone(
    folder: Path, name: str = LEASE, doing: str = "another run", while_waiting: WhileWaiting = nothing
) -> Iterator[Lease]:
    """`hold` a folder while a block runs."""
    lease = hold(folder, name, doing, while_waiting)
    try:
        yield lease
    finally:
        lease.end()


def once(path: Path, make: Callable[[], None], while_waiting: WhileWaiting = nothing) -> None:
    """Have ``path`` made by one of all processes that need it; the others wait for it, and an error of that one is
    everybody's.

    ``make`` writes it whole. Raises Fault as ``make`` does, in all that waited for it. Who made it may leave it to the
    next, as a signal asks for.
    """
    lease_path = path.with_name(f".{path.name}.lease")
    failure_path = path.with_name(f".{path.name}.failed")
    waited_for: set[str] = set()
    make_folder(path.parent)
    while not path.exists():
        lease = take(lease_path, enough=path.exists, while_waiting=while_waiting)
        if lease is None:
            return
        if isinstance(lease, Holder):
            waited_for.add(lease.key)
            time.sleep(0.2)
        if waited_for and (said := _failure(failure_path, waited_for)):
            if isinstance(lease, Lease):
                lease.end()
            raise Fault(said)
        if isinstance(lease, Lease):
            try:
                if not path.exists():
                    make()
            except Fault as fault:
                write_whole(failure_path, json.dumps({"key": lease.me.key, "says": str(fault)}))
                raise
            else:
                failure_path.unlink(missing_ok=True)
            finally:
                lease.end()


def _failure(path: Path, keys: set[str]) -> str | None:
    """What one of these holders ended with, where it failed."""
    try:
        failure = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return failure["says"] if failure["key"] in keys else None
