"""What a setting may be, declared beside its type: words for a person, and a test of the value.

    depth: Annotated[int, within(least=1)]
    attention: Annotated[str, one_of("sdpa", "xformers")]
    std: Annotated[list[float], numbers(3), within(above=0)]

What two settings must be to each other is declared once beside them, as functions that raise ValueError:

    agreements: ClassVar[Agreements] = {("width", "heads"): check_heads}

Where a setting changes nothing is declared beside its type too:

    drop_path_rising: Annotated[bool, idle_where("drop_path", 0)]

Networks and objectives declare both in their constructors and classes, settings in their dataclasses;
`pretrain.settings.ranges` holds values to them.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Agreements = Mapping[tuple[str, ...], Callable[..., object]]
"""By the names of settings, dotted for those of a setting inside: what raises ValueError where their values don't go
together."""


@dataclass(frozen=True)
class Allowed:
    """Values that a setting may have, and the words for them; of a list, its items or ``whole``. ``absent``: values that
    people look for and that aren't there, each with the sentence why."""

    says: str
    holds: Callable[[Any], bool]
    whole: bool = False
    absent: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Idle:
    """A setting changes nothing while the one beside it, ``by``, has one of these values."""

    by: str
    values: tuple[Any, ...]


def idle_where(by: str, *values: Any) -> Idle:
    """Of no effect while another setting of the same class is one of ``values``."""
    return Idle(by, values)


def within(
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    absent: tuple[tuple[str, str], ...] = (),
) -> Allowed:
    """Numbers between bounds; never infinity or NaN."""
    bounds = ((least, "at least"), (above, "more than"), (most, "at most"), (below, "less than"))
    says = " and ".join(
        f"{words} {f'{bound:g}' if abs(bound) < 1e6 else f'{bound:,}'}" for bound, words in bounds if bound is not None
    )

    def holds(value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and math.isfinite(value)
            and not (
                (least is not None and value < least)
                or (above is not None and value <= above)
                or (most is not None and value > most)
                or (below is not None and value >= below)
            )
        )

    return Allowed(says or "a finite number", holds, absent=absent)


def one_of(*choices: str, absent: tuple[tuple[str, str], ...] = ()) -> Allowed:
    """Words of a list."""
    return Allowed(f"{', '.join(choices[:-1])} or {choices[-1]}", lambda value: value in choices, absent=absent)


def matching(pattern: str, says: str) -> Allowed:
    """Words of a form."""
    return Allowed(says, lambda value: re.fullmatch(pattern, value) is not None)


def numbers(count: int) -> Allowed:
    """Lists of so many numbers."""
    return Allowed(f"{count} numbers", lambda value: len(value) == count, whole=True)


SOME = Allowed("at least one", lambda value: len(value) > 0, whole=True)
"""Lists that aren't empty."""

RANGE = Allowed("two numbers, the lower one first", lambda value: len(value) == 2 and value[0] <= value[1], whole=True)
"""Lists of the ends of a range."""

SHARE = within(least=0, most=1)
"""Probabilities and shares."""

ON_DISK = Allowed(
    "a path on a disk, and no URL: only shards are read from those", lambda value: "://" not in str(value)
)
"""Files and folders that are opened where they lie."""

FILE_STEM = matching(
    r"[A-Za-z0-9][A-Za-z0-9_.-]*", "a file's name without its ending: letters, digits, and - _ . behind the first"
)
"""Beginnings of names of files that are made."""


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


PATTERN = Allowed("a regular expression, as Python has them", _is_pattern)
"""What a part of a name is found by."""

PIXEL_COUNT = within(least=1, most=16_384)
"""A view's pixels a side; a larger one is no mistake of memory but of typing."""

PROTOTYPES = within(least=1, most=10_000_000)
"""Prototypes of a head: 76 times as many as any published."""

TILE = within(least=16)
"""A tile's pixels a side: one patch of a network at least, or a slide is millions of tiles that nothing can be learned
from."""
