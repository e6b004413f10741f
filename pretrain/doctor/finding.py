"""What a check found: one line, and whether a job may go ahead."""

from dataclasses import dataclass

PASS, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Finding:
    """``status`` is one of `PASS`, `WARN` (a job may start, but see to it) and `FAIL` (it would fail, or waste its
    hours)."""

    status: str
    about: str
    says: str


def passed(about: str, says: str) -> Finding:
    """All is well."""
    return Finding(PASS, about, says)


def warned(about: str, says: str) -> Finding:
    """A job may start, but see to it."""
    return Finding(WARN, about, says)


def failed(about: str, says: str) -> Finding:
    """A job would fail, or waste its hours."""
    return Finding(FAIL, about, says)
