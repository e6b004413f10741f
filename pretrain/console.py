"""Where a process says what it does: a full disk, or a reader that is gone, ends nothing but what is said."""

from contextlib import suppress
from typing import TextIO


class Unfailing:
    """A stream that drops what it can't write. Its reader may end (``| head``, a viewer, a terminal) and its disk fill
    up; work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)
