"""What a setting's value may be, declared once beside its type, and said in one sentence where it isn't.

    nodes: Annotated[int, within(least=1)]
    after: Annotated[list[str], matching(r"\\d+", "a job's number")]

`pretrain.settings.load` holds every value to it: those of a command, of the dataclasses inside, of plug-ins, and of ``launch``. ``null`` is
always allowed where the type allows it; in a list, each of its items is looked at.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from data.fault import Fault
from pretrain import plugins


@dataclass(frozen=True)
class Allowed:
    """Values that a setting may have, and the words for them."""

    says: str
    holds: Callable[[Any], bool]


def within(
    *, least: float | None = None, above: float | None = None, most: float | None = None, below: float | None = None
) -> Allowed:
    """Numbers between bounds; never infinity or NaN."""
    bounds = ((least, "at least"), (above, "more than"), (most, "at most"), (below, "less than"))
    says = " and ".join(f"{words} {bound:g}" for bound, words in bounds if bound is not None)

    def holds(value: float) -> bool:
        return math.isfinite(value) and not (
            (least is not None and value < least)
            or (above is not None and value <= above)
            or (most is not None and value > most)
            or (below is not None and value >= below)
        )

    return Allowed(says, holds)


def matching(pattern: str, says: str) -> Allowed:
    """Words of a form."""
    return Allowed(says, lambda value: re.fullmatch(pattern, value) is not None)


def check(values: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> None:
    """Raise Fault for the first of ``values`` that its kind, of `hints`, doesn't allow."""
    for name, kind in kinds.items():
        if (value := values.get(name)) is not None and value != "???":
            _check(f"{prefix}{name}", value, kind)


def hints(kind: Any) -> dict[str, Any]:
    """The names and types of a dataclass's settings or a constructor's, with what they allow."""
    return get_type_hints(kind, include_extras=True)


def _check(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Annotated:
        kind, *extras = get_args(kind)
        for allowed in extras:
            if isinstance(allowed, Allowed):
                _hold(name, value, allowed)
    if kind == plugins.Plugin and "_target_" in value:
        check(value, hints(plugins.locate(value["_target_"], object).__init__), f"{name}.")  # type: ignore[misc]
    elif dataclasses.is_dataclass(kind):
        check(value, hints(kind), f"{name}.")
        if plugins.has_plugin_beside(kind):
            check(value, hints(plugins.locate(value["_target_"], object).__init__), f"{name}.")  # type: ignore[misc]
    elif isinstance(value, dict) and get_args(kind):
        for key, one in value.items():
            _check(f"{name}.{key}", one, get_args(kind)[1])


def _hold(name: str, value: Any, allowed: Allowed) -> None:
    if isinstance(value, list):
        for item in value:
            if not allowed.holds(item):
                raise Fault(f"{name} holds {item!r}, which is not allowed: each must be {allowed.says}.")
    elif not allowed.holds(value):
        raise Fault(f"{name}={value} is not allowed: it must be {allowed.says}.")
