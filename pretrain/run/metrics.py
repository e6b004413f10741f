"""``metrics.jsonl`` of a run: one JSON object a line, in order of steps; read whole, from its end, or thinned while it
is read.

A run of a million steps has half a gigabyte of it. What a resumed run looks back on is at its end, and what a page shows
is a sample of its lines: neither takes longer, or more memory, for a longer run than reading the bytes does.
"""

import json
import os
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from data.files import appearing

BYTES_A_READ = 2**20  # bytes read at a time
TAIL = 2**23  # bytes that a resumed run looks back on: some 15,000 steps
STEP = re.compile(rb'\{"step": (\d+)[,}]')  # how a line begins
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
    """Take out what was recorded after ``step``, wherever it stands: the steps that are about to be taken again. A line
    that a kill cut short, or that is none, goes too."""
    path, kept, end = path_of(run), 0, 0  # kept: where the lines end that stay and have none before them that goes
    for line in _lines(path):
        begin, end = end, end + len(line)
        if _is_of(line, step):
            if kept < begin:
                break
            kept = end
    else:
        if kept < end:
            os.truncate(path, kept)
        return
    with appearing(path) as partial, partial.open("wb") as file:
        file.writelines(line for line in _lines(path) if _is_of(line, step))


def _is_of(line: bytes, most: int) -> bool:
    """Whether a line is whole, and of a step up to ``most``. A line is read no further than its step."""
    found = STEP.match(line)
    return found is not None and int(found[1]) <= most and line.endswith(b"\n")


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
