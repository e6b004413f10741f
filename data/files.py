"""Files and folders that are there whole or not at all, whatever kills their writer and whoever else writes them at the
same time.

    .index.npz.4211-node7-1f3a.partial   being written: no two processes of any nodes share such a name
    index.npz                            flushed to the disk and renamed: this writer's or another's, never a mixture

This is the only place that knows what a file system refuses, and says it in a sentence.
"""

import errno
import filecmp
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.fault import Fault

PARTIAL = ".partial"
WAYS_OUT = {
    errno.ENOSPC: "make room there, then run the same command again",
    errno.EDQUOT: "your quota there is used up: make room, then run the same command again",
    errno.EROFS: "that disk is read-only: give a folder on another",
    errno.EACCES: "see that this user may, or give another path",
    errno.EPERM: "see that this user may, or give another path",
    errno.ENOTDIR: "something in that path is a file and not a folder: give another",
    errno.EEXIST: "a file of that name is in the way: give another folder",
    errno.EISDIR: "that is a folder: give a file's name",
    errno.ENOENT: "something above it is not there and can't be made: give another",
    errno.ENAMETOOLONG: "that name is longer than the file system takes: give a shorter one",
}


LIBRARIES_SAY = re.compile(
    r"PytorchStreamWriter|iostream error|unexpected pos|enforce fail at inline_container|No space left on device"
)
"""What torch's and other libraries' own errors say of a disk that refused."""


class Refused(Fault):
    """A file system refused to be written to: the fault of no single slide, so the work ends, and goes on when there is
    room."""


def refused(path: Path | str, error: OSError) -> Refused:
    """The sentence for what a file system refused."""
    way_out = WAYS_OUT.get(error.errno or 0, "make room or fix the disk, then run the same command again")
    return Refused(f"{path} can't be written ({error.strerror or error}): {way_out}.")


def is_the_disks(error: BaseException) -> bool:
    """Whether an error, of Python's or of a library that writes, says that the disk refused."""
    return isinstance(error, OSError) or bool(LIBRARIES_SAY.search(str(error)))


@contextmanager
def refusals(path: Path | str) -> Iterator[None]:
    """What a file system refuses while ``path`` is written becomes Refused."""
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error
    except Exception as error:
        if isinstance(error, Fault) or not is_the_disks(error):
            raise
        raise refused(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error


def denied(error: OSError) -> Fault | None:
    """The sentence for an error of the file system that nobody nearer to it put in words, where a person can put it
    right."""
    if error.errno not in WAYS_OUT or not error.filename:
        return None
    return Fault(f"{error.filename}: {error.strerror}; {WAYS_OUT[error.errno]}.")


def make_folder(folder: Path) -> Path:
    """The folder, made if need be with those above it. Raises Refused where that is."""
    with refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def unfinished(path: Path) -> Path:
    """A name beside ``path`` for what isn't whole yet, unlike that of any other process on any node. Raises Fault where
    ``path`` ends in no name, as ``.`` and ``/`` do."""
    if path.name in ("", ".."):
        raise Fault(f"{path} names nothing that could be made: give a path that ends in a name.")
    host = re.sub(r"[^A-Za-z0-9]+", "", platform.node())[:16]
    ending = f".{os.getpid()}-{host}-{secrets.token_hex(4)}{PARTIAL}"
    return path.with_name(f".{path.name[: 250 - len(ending)]}{ending}")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which takes the place of ``path`` when the block ends, and is removed where that
    fails. A block that writes nothing leaves ``path`` as it is.

    Raises Refused where the file system refuses any of it.
    """
    path = Path(path)
    make_folder(path.parent)
    partial = unfinished(path)
    try:
        with refusals(path):
            yield partial
            if partial.exists():  # or there turned out to be nothing to write
                flush(partial)
                partial.replace(path)
                flush(path.parent)
    finally:
        remove(partial)


def write_whole(path: Path, content: str | bytes, private: bool = False) -> None:
    """Replace a file in one step: whole or as it was, and ``private``: for its owner's eyes. Raises Refused where the
    file system refuses."""
    with appearing(path) as partial:
        if private:
            partial.touch(0o600)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def create_whole(path: Path, content: str) -> bool:
    """Make a small file if there is none: whole, and by one of those who try at once. Whether it was this one."""
    make_folder(path.parent)
    partial = unfinished(path)
    try:
        partial.write_text(content)
        flush(partial)
        try:
            os.link(partial, path)  # fails where another was first
        except FileExistsError:
            return False
        except OSError:  # no hard links here: another may see it before its content, which is one write
            try:
                with path.open("x") as file:
                    file.write(content)
            except FileExistsError:
                return False
        return True
    except OSError as error:
        raise refused(path, error) from error
    finally:
        remove(partial)


def create_folder_whole(folder: Path, fill: Callable[[Path], None]) -> bool:
    """Let ``fill`` write into an empty folder, which gets the name ``folder`` when it is whole. Of those who try at once
    each fills its own, and one gets the name.

    False where ``folder`` holds the very same files already. Raises Fault where it holds anything else, and Refused
    where the file system refuses any of it.
    """
    partial = make_folder(unfinished(folder))
    try:
        with refusals(folder):
            fill(partial)
            for path in (*partial.rglob("*"), partial):
                flush(path)
            try:
                partial.rename(folder)  # an empty folder gives way
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if _hold_the_same(partial, folder):
                    return False
                raise Fault(f"{folder} already holds something else: give another name, or remove it.") from error
            flush(folder.parent)
            return True
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _hold_the_same(one: Path, other: Path) -> bool:
    names, others = (sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (one, other))
    files = [name for name in names if (one / name).is_file()]
    return names == others and filecmp.cmpfiles(one, other, files, shallow=False)[0] == files


def remove(path: Path) -> None:
    """Remove a file that is in nobody's way: where that is refused too, what was refused first is what to say."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Raise Refused where a file couldn't be written at ``path``; asked before long work whose result goes there. Makes
    nothing."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    partial = unfinished(there / path.name)
    try:
        partial.touch()
    except OSError as error:
        raise refused(path, error) from error
    finally:
        remove(partial)


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
            raise
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Bytes that are free where ``folder`` is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
