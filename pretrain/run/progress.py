"""How far, how fast, how long: a bar on a terminal, plain timed lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from data.redaction import redacted

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """Print one line to the person watching, without tearing a progress bar, and without what is private in a URL."""
    tqdm.write(redacted(line), file=sys.stderr)
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """``75`` → ``"1m15s"``: a duration as a person says it."""
    seconds = round(seconds)
    hours, minutes = divmod(seconds // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


class Progress:
    """Progress over ``total`` units of work, of which ``done`` were finished by an earlier run.

    On a terminal it is a tqdm bar. In a log it is a line at the start of the work, one every ten seconds, and one at
    its end, each with the share done, the rate and the time left.
    """

    def __init__(self, total: int, label: str, unit: str, done: int = 0) -> None:
        self.total, self.label, self.unit = total, redacted(label), unit
        self.first = self.done = done
        self.note = ""
        self.started = self.spoke = time.monotonic()
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=done, desc=self.label, unit=f" {unit}", dynamic_ncols=True, file=sys.stderr
            )

    def advance(self, units: int = 1, note: str = "") -> None:
        """Record that ``units`` more are done; ``note`` (a loss, a slide's name) is shown beside the count."""
        self.done += units
        self.note = redacted(note) or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(units)
        elif time.monotonic() - self.spoke >= SECONDS_BETWEEN_LINES:
            self._line()

    def close(self) -> None:
        """End the bar, or say the last line."""
        if self.bar is not None:
            self.bar.close()
        else:
            self._line()

    def _line(self) -> None:
        self.spoke = time.monotonic()
        elapsed = self.spoke - self.started
        rate = (self.done - self.first) / elapsed if elapsed > 0 else 0.0
        left = f", {duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        note = f", {self.note}" if self.note else ""
        say(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {duration(elapsed)}"
            f" gone{left}{note}"
        )


def track(iterable: Iterable[T], total: int, label: str, unit: str, done: int = 0) -> Iterator[T]:
    """Yield from ``iterable`` while showing progress over ``total`` units (see `Progress`)."""
    progress = Progress(total, label, unit, done)
    try:
        for item in iterable:
            yield item
            progress.advance()
    finally:
        progress.close()
