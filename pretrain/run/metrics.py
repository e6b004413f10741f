"""``metrics.jsonl`` of a run: one JSON object a line, in order of steps; read whole, from its end, or thinned while it
is read.

A run of a million steps has half a gigabyte of it. What a resumed run needs is at its end, and what a page shows is a
sample of its lines: neither takes longer, or more memory, for a longer run than reading the bytes does.
"""

import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

BYTES_A_READ = 2**20  # bytes read at a time
TAIL = 2**23  # bytes that a resumed run looks back on: some 15,000 steps
SHOWN = 8192  # ordinary lines that `thinned` gives at most


def path_of(run: Path) -> Path:
    """Where a run keeps it."""
    return run / "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records, oldest first; a last line that a kill cut short is left out."""
    return list(_parsed(_lines(path_of(run))))


def tail(run: Path) -> list[dict[str, Any]]:
    """The records of the last `TAIL` bytes, oldest first."""
    path = path_of(run)
    begin = max(0, (path.stat().st_size if path.exists() else 0) - TAIL)
    lines = _lines(path, begin)
    if begin:
        next(lines, None)  # a piece of one
    return list(_parsed(lines))


def of_the_start(run: Path) -> list[dict[str, Any]]:
    """The records of step 0, before the first step was taken."""
    return list(takewhile(lambda record: record.get("step") == 0, _parsed(_lines(path_of(run)))))


def thinned(run: Path) -> list[dict[str, Any]]:
    """The records, of those of ordinary steps about `SHOWN` at even distances and the last one.

    All of the others are there: alarms, looks at features, evaluations, and steps whose figures aren't finite.
    """
    path = path_of(run)
    size = path.stat().st_size if path.exists() else 0
    kept: list[bytes] = []
    stride, ordinary, last = 0, 0, b""
    for line in _lines(path):
        stride = stride or max(1, size // max(1, len(line)) // SHOWN)
        if b'"loss": ' not in line[:40] or b"null" in line or b"NaN" in line:
            kept.append(line)
            continue
        if ordinary % stride == 0:
            kept.append(line)
        last, ordinary = line, ordinary + 1
    if ordinary and (ordinary - 1) % stride:
        kept.append(last)
    return list(_parsed(iter(kept)))


def rewind(run: Path, step: int) -> None:
    """Cut off what was recorded after ``step``, the steps that are about to be taken again, and a line that a kill cut
    short."""
    path = path_of(run)
    if not path.exists():
        return
    with path.open("r+b") as file:
        for end, line in _backwards(file):
            found = _step(line)
            if found is not None and found <= step:
                file.truncate(end)
                if not line.endswith(b"\n"):
                    file.seek(end)
                    file.write(b"\n")
                return
        file.truncate(0)


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from the last to the first, each with the place where it ends."""
    position, held = file.seek(0, 2), b""  # held: the end of a line that begins further up
    while position:
        begin = max(0, position - BYTES_A_READ)
        file.seek(begin)
        block = file.read(position - begin) + held
        lines, end = block.splitlines(keepends=True), begin + len(block)
        held = lines.pop(0) if begin else b""
        for line in reversed(lines):
            yield end, line
            end -= len(line)
        position = begin


def _step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _lines(path: Path, begin: int = 0) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb", buffering=BYTES_A_READ) as file:
            file.seek(begin)
            yield from file


def _parsed(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return
