"""Byte ranges of files behind ``http(s)://``, ``s3://``, ``gs://`` and whatever else fsspec reaches, by a patient
reader.

A read that fails, stalls or comes back short is tried again, each time after twice the pause; what stays broken ends in
an error that names the URL. What can't get better (no such file, no permission, a server without byte ranges) ends at
once.

A folder's URL may be signed: the query of ``https://host/shards?token=…`` stays behind the path of each of its files.
Passwords and headers come from fsspec's own configuration (``FSSPEC_HTTPS='{"client_kwargs": {"headers": {…}}}'``,
files in ~/.config/fsspec).
"""

import io
import os
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

import aiohttp
import fsspec
import numpy as np
from fsspec.asyn import AsyncFileSystem, sync

from data.fault import Fault
from data.seekable import SeekableFile

READ_ATTEMPTS = 5
PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
STALLED_AFTER = 30.0  # seconds without a byte after which a read counts as stalled
FILE_SYSTEM_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}
VERSIONS = ("ETag", "etag", "blob_id")  # of http and S3, of GCS and Azure, of the hub
HOPELESS = (FileNotFoundError, Fault)
READ_AHEAD = 4 << 20  # bytes, where a file is read from front to back
FETCHED_AT_ONCE = 8  # blocks, beside those that somebody waits for
PAGE = 16_384  # rows of a column that are read at once

Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)
Block = TypeVar("Block")


class Truncated(Fault):
    """A file ends before the bytes that were asked for; ``data`` are those that there are."""

    def __init__(self, message: str, data: bytes = b"") -> None:
        super().__init__(message)
        self.data = data


def is_remote(place: str | Path) -> bool:
    """Whether a name is a URL, and not a path on this machine."""
    return "://" in str(place)


def url_within(folder: str, name: str) -> str:
    """The URL of a file of a remote folder; a query stays where it belongs."""
    path, mark, query = folder.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes ``[start, stop)`` of a file. Raises OSError where there is no such file, Truncated where it is shorter, and
    Fault where it can't be read for good."""
    if start >= stop:
        return b""

    def attempt(system: Any, path: str) -> bytes:
        data = _waited_for(
            system,
            system._cat_file if isinstance(system, AsyncFileSystem) else system.cat_file,
            path,
            start=start,
            end=stop,
        )
        if len(data) > stop - start:
            raise Fault(
                f"the server of {url} ignores byte ranges, and a whole file for every few tiles would never end: "
                "serve the files with one that knows Range requests, or copy them to a disk."
            )
        if len(data) < stop - start:
            raise Truncated(
                f"{url} ends {stop - start - len(data)} bytes early, at byte {start + len(data)} of at least {stop}",
                data,
            )
        return data

    return _persistent(url, attempt)


def size_of(url: str) -> int:
    """A file's length in bytes. Raises as `read_range` does."""
    return size_and_version(url)[0]


def size_and_version(url: str) -> tuple[int, str]:
    """A file's length in bytes, and what its server calls its content, "" where it doesn't say. Raises as `read_range`
    does."""

    def attempt(system: Any, path: str) -> tuple[int, str]:
        info = _waited_for(system, system._info if isinstance(system, AsyncFileSystem) else system.info, path)
        if info.get("size") is None:
            raise Fault(f"the server of {url} doesn't say how long the file is, which reading parts of it takes.")
        return int(info["size"]), next((str(info[name]) for name in VERSIONS if info.get(name)), "")

    return _persistent(url, attempt)


def list_names(url: str, ending: str) -> list[str]:
    """Names of the files in a folder that end so, sorted. For http(s), those that the folder's page links to. Raises
    Fault where there is no such folder, or page."""

    def attempt(system: Any, path: str) -> list[str]:
        found = _waited_for(
            system, system._ls if isinstance(system, AsyncFileSystem) else system.ls, url_within(path, ""), detail=False
        )
        # A link that is relative comes behind the whole address of the page, the query included.
        names = {_last(name.removeprefix(f"{url_within(path, '').rstrip('/')}/")) for name in found}
        return sorted(name for name in names if name.endswith(ending))

    try:
        return _persistent(url, attempt)
    except FileNotFoundError as error:
        page = ", or has no page that lists its files, which finding them takes" if url.startswith("http") else ""
        raise Fault(f"{url} is not there{page}: check the address, or copy the files to a disk.") from error


def find_files(url: str, ending: str) -> list[str]:
    """URLs of the files in a folder and below it, or that a glob matches, which end so, sorted. Raises Fault where there
    is no such folder, and for http(s), which knows no folders."""
    protocol = url.partition("://")[0]
    if protocol in ("http", "https"):
        raise Fault(f"{url} is no file, and a web server doesn't list its folders: give each file's URL.")

    def attempt(system: Any, path: str) -> list[str]:
        name = "glob" if "*" in path else "find"
        asynchronous = isinstance(system, AsyncFileSystem) and hasattr(system, f"_{name}")
        found = _waited_for(system, getattr(system, f"_{name}" if asynchronous else name), path)
        return sorted(f"{protocol}://{file}" for file in found if file.endswith(ending))

    try:
        return _persistent(url, attempt)
    except FileNotFoundError as error:
        raise Fault(f"{url} is not there, or not for you ({error}): check the address, and who may read it.") from error


def _last(url: str) -> str:
    """The last part of a path, without a query behind it."""
    return url.partition("?")[0].rstrip("/").rpartition("/")[2]


class RemotePath:
    """A file behind a URL, with as much of ``pathlib.Path`` as reading it takes."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url, _last(url)
        self.stem = self.name.rpartition(".")[0]

    def __str__(self) -> str:
        return self.url

    def stat(self) -> os.stat_result:
        """``st_size`` and nothing else."""
        return os.stat_result((0, 0, 0, 0, 0, 0, size_of(self.url), 0, 0, 0))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The file, to read and seek in by ranges of 4 MiB."""
        assert mode == "rb", "remote files are only read"
        return io.BufferedReader(_RangeFile(self.url), READ_AHEAD)


class RemoteColumn:
    """One column of an index that lies behind a URL: like a one-dimensional array, read a page of rows at a time."""

    def __init__(self, url: str, dtype: np.dtype, start: int, rows: int) -> None:
        self.url, self.dtype, self.start, self.shape = url, dtype, start, (rows,)
        self._pages: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        """A row, a slice without a step, or an array of rows."""
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            assert step == 1, "columns are read forwards"
            pages = [self._page(page) for page in range(first // PAGE, -(-max(last, first) // PAGE))]
            return np.concatenate(pages)[first % PAGE :][: last - first] if last > first else np.empty(0, self.dtype)
        if np.ndim(rows):
            return np.array([self[int(row)] for row in rows], dtype=self.dtype)
        return self._page(int(rows) // PAGE)[int(rows) % PAGE]

    def _page(self, page: int) -> np.ndarray:
        found = self._pages.get(page)
        if found is None:
            first, last = page * PAGE, min((page + 1) * PAGE, len(self))
            size = self.dtype.itemsize
            found = np.frombuffer(
                read_range(self.url, self.start + first * size, self.start + last * size), dtype=self.dtype
            )
            if len(self._pages) > 64:
                self._pages = {}
            self._pages[page] = found
        return found


class _RangeFile(SeekableFile):
    def __init__(self, url: str) -> None:
        super().__init__(size_of(url))
        self.url = url

    def readinto(self, buffer: Any) -> int:
        data = read_range(self.url, self.position, min(self.position + len(buffer), self.length))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _persistent(url: str, attempt: Callable[[Any, str], Result]) -> Result:
    """The result of ``attempt(file system, path)``, tried again and again while there is hope."""
    system, path = _file_system(url)
    began = time.monotonic()
    for number in range(1, READ_ATTEMPTS + 1):
        try:
            return attempt(system, path)
        except Exception as raised:  # every file system of fsspec has errors of its own
            error, cause = raised, raised.__cause__
            if isinstance(error, FileNotFoundError) and isinstance(cause, aiohttp.ClientError | TimeoutError):
                # That is fsspec's word for every file that it learns nothing about, as where it is refused.
                error = error if getattr(cause, "status", None) in (404, 410) else cause
            if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # as S3 and as GCS say it
                raise Fault(f"{url} is refused ({error}): check the address and who may read it.") from error
            if isinstance(error, HOPELESS) and not isinstance(error, Truncated):
                raise
            name = "status" if hasattr(error, "status") else "code"  # aiohttp's, and gcsfs's
            status = getattr(error, name, None)
            if status == 416:
                raise Truncated(f"{url} ends before the bytes that its index says it has") from error
            if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
                raise Fault(
                    f"{url} is refused (HTTP {status} {getattr(error, 'message', '')}): check the address and who may"
                    " read it."
                ) from error
            if number == READ_ATTEMPTS:
                if isinstance(error, Truncated):
                    raise
                raise Fault(
                    f"{url} can't be read ({str(error) or type(error).__name__}), tried {READ_ATTEMPTS} times over"
                    f" {time.monotonic() - began:.0f} s: check the server and the network, then run the same command"
                    " again."
                ) from error
            time.sleep(PAUSE * 2 ** (number - 1))
    raise AssertionError("the last attempt returns or raises")


def _file_system(url: str) -> tuple[Any, str]:
    # fsspec keeps one instance a process for the same arguments, and makes a new one after a fork.
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    patience = aiohttp.ClientTimeout(total=None, sock_connect=STALLED_AFTER, sock_read=STALLED_AFTER)
    if protocol in ("http", "https"):
        theirs = [fsspec.config.conf.get(name, {}).get("client_kwargs", {}) for name in ("http", "https")]
        options["client_kwargs"] = theirs[0] | theirs[1] | {"timeout": patience}
    elif protocol in ("gs", "gcs"):
        options["requests_timeout"] = patience
    try:
        return fsspec.url_to_fs(url, **options)
    except ImportError as error:
        package = FILE_SYSTEM_PACKAGES.get(protocol, str(error))
        raise Fault(f"reading {url} takes the package {package}: pip install {package}.") from error
    except ValueError as error:
        raise Fault(f"{url} can't be read: {error}.") from error


def _waited_for(system: Any, function: Any, *arguments: Any, **named: Any) -> Any:
    """Call a file system's function; where it is asynchronous, wait for it a multiple of `STALLED_AFTER` and no
    longer."""
    if not isinstance(system, AsyncFileSystem):
        return function(*arguments, **named)
    return sync(system.loop, function, *arguments, timeout=10 * STALLED_AFTER, **named)


class BlockCache(Generic[Key, Block]):
    """The last ``capacity`` blocks that were asked for, each fetched once, in the background where it is announced."""

    def __init__(self, fetch: Callable[[Key], Block]) -> None:
        self.fetch, self.capacity = fetch, 8
        self._at_once = threading.Semaphore(FETCHED_AT_ONCE)
        self._blocks: dict[Key, _Pending[Key, Block]] = {}
        self._lock = threading.Lock()

    def get(self, key: Key) -> Block:
        """A block; fetched here where nobody has begun to."""
        return self._pending(key)[0].wait()

    def announce(self, key: Key) -> None:
        """Begin to fetch a block in a thread of its own."""
        pending, new = self._pending(key)
        if new:
            threading.Thread(target=self._fetch_ahead, args=(pending,), daemon=True).start()

    def _fetch_ahead(self, pending: "_Pending[Key, Block]") -> None:
        with self._at_once:
            pending.run()

    def _pending(self, key: Key) -> "tuple[_Pending[Key, Block], bool]":
        with self._lock:
            known = self._blocks.pop(key, None)
            pending = self._blocks[key] = known or _Pending(self.fetch, key)  # the latest comes last
            while len(self._blocks) > self.capacity:
                self._blocks.pop(next(iter(self._blocks)))
        return pending, known is None

    def __reduce__(self) -> "tuple[type[BlockCache[Key, Block]], tuple[Callable[[Key], Block]]]":
        return BlockCache, (self.fetch,)  # a copy for another process fetches its own


class _Pending(Generic[Key, Block]):
    """One block: fetched by whoever comes first; the others wait. An error stays, it was fought long enough."""

    def __init__(self, fetch: Callable[[Key], Block], key: Key) -> None:
        self._fetch, self._key, self._lock = fetch, key, threading.Lock()
        self._data: Block | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        with self._lock:
            if self._data is None and self._error is None:
                try:
                    self._data = self._fetch(self._key)
                except Exception as error:  # handed to everyone who waits
                    self._error = error

    def wait(self) -> Block:
        self.run()
        if self._error is not None:
            raise self._error
        assert self._data is not None
        return self._data
