"""Hold settings to what is declared beside their types (`models.allowed`), and say it in one sentence where they don't.

`pretrain.settings.composition.load` holds every value to it: those of a command, of the dataclasses inside, of
plug-ins, and of ``launch``. ``null`` is always allowed where the type allows it; in a list, each of its items is looked
at.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from torch import nn

from data.fault import Fault
from models.allowed import Agreements, Allowed, Idle, matching, one_of, within
from pretrain.settings import plugins

__all__ = ["Agreements", "Allowed", "declared", "hints", "matching", "one_of", "require_allowed", "within"]

MISSING = "???"  # a value that is still to be given


def require_allowed(values: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> None:
    """Raise Fault for the first of ``values`` that its kind, of `hints`, doesn't allow."""
    for name, kind in kinds.items():
        if (value := values.get(name)) is not None and value != MISSING:
            _check(f"{prefix}{name}", value, kind)


def check_whole(values: Mapping[str, Any], kind: Any, prefix: str = "") -> None:
    """Hold the values of a dataclass, or of a plug-in's constructor, to its types and to its ``agreements``."""
    require_allowed(values, _settings_of(kind), prefix)
    for names, agree in getattr(kind, "agreements", {}).items():
        given = [_inner(values, name) for name in names]
        if MISSING in given:
            continue
        try:
            agree(*given)
        except ValueError as error:
            *some, last = (f"{prefix}{name}={_plain(value)}" for name, value in zip(names, given, strict=True))
            raise Fault(
                f"{', '.join(some)} and {last} don't go together: {error}." if some else f"{last}: {error}."
            ) from error


@cache
def hints(kind: Any) -> dict[str, Any]:
    """The names and types of a dataclass's settings or a constructor's, with what they allow."""
    return plugins.hints_of(kind, include_extras=True)


def _settings_of(kind: Any) -> dict[str, Any]:
    """`hints` of a dataclass, or of a plug-in's constructor."""
    found: Any = kind if dataclasses.is_dataclass(kind) else kind.__init__
    return hints(found)


def declared(values: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Allowed]]:
    """What is declared of ``values`` and those inside them: dotted names, each with one thing that it allows."""
    for name, kind in kinds.items():
        if name not in values:
            continue
        kind, extras = apart(kind)
        yield from ((f"{prefix}{name}", allowed) for allowed in extras)
        value = values[name]
        for inner in _inside(kind, value):
            yield from declared(value, _settings_of(inner), f"{prefix}{name}.")
        if _is_table(kind, value):
            yield from declared(value, dict.fromkeys(value, get_args(kind)[1]), f"{prefix}{name}.")


def idle(values: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Which of ``values`` and those inside them change nothing: dotted names, each with ``setting=value`` of the one
    that makes it so."""
    for name, kind in kinds.items():
        if name not in values:
            continue
        for extra in get_args(kind)[1:] if get_origin(kind) is Annotated else ():
            if isinstance(extra, Idle) and (value := values.get(extra.by, MISSING)) in extra.values:
                yield f"{prefix}{name}", f"{prefix}{extra.by}={_plain(value)}"
        for inner in _inside(apart(kind)[0], values[name]):
            yield from idle(values[name], _settings_of(inner), f"{prefix}{name}.")


def _check(name: str, value: Any, kind: Any) -> None:
    kind, extras = apart(kind)
    for allowed in extras:
        _hold(name, value, allowed)
    if value == "" or (isinstance(value, list) and "" in value):
        raise Fault(f"{name} is empty: give a value, or leave it out (is a variable of the shell unset?).")
    for inner in _inside(kind, value):
        check_whole(value, inner, f"{name}.")
    if _is_table(kind, value):
        require_allowed(value, dict.fromkeys(value, get_args(kind)[1]), f"{name}.")


def apart(kind: Any) -> tuple[Any, list[Allowed]]:
    """A type, and what is declared beside it. A dataclass beside ``Any`` is the type of values that may lack some of
    its own."""
    if get_origin(kind) is not Annotated:
        return kind, []
    kind, *extras = get_args(kind)
    kind = next((extra for extra in extras if dataclasses.is_dataclass(extra) and isinstance(extra, type)), kind)
    return kind, [extra for extra in extras if isinstance(extra, Allowed)]


def base_of(kind: Any) -> type:
    """The class that a plug-in's must be: what is declared beside its type, or any network."""
    beside = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((extra for extra in beside if isinstance(extra, type)), nn.Module)


def _inside(kind: Any, value: Any) -> Iterator[Any]:
    """The dataclasses and plug-ins that the settings inside a value belong to."""
    if not isinstance(value, dict):
        return
    if dataclasses.is_dataclass(kind):
        yield kind
    if (kind == plugins.Plugin or plugins.has_plugin_beside(kind)) and "_target_" in value:
        yield plugins.locate_class(value["_target_"], object)


def _is_table(kind: Any, value: Any) -> bool:
    """Whether a value is a dictionary of settings of one type, by names of the user's."""
    return isinstance(value, dict) and get_origin(kind) is dict and get_args(kind)[1] is not Any


def _inner(values: Any, name: str) -> Any:
    """The value of a dotted name; `MISSING` where there is none."""
    for part in name.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return MISSING
        values = values[part]
    return values


def _hold(name: str, value: Any, allowed: Allowed) -> None:
    if isinstance(value, list) and not allowed.whole:
        for item in value:
            if not allowed.holds(item):
                raise Fault(f"{name} holds {item!r}, which is not allowed: each must be {_wanted(item, allowed)}.")
    elif not allowed.holds(value):
        why = dict(allowed.absent).get(_plain(value))
        if isinstance(value, str) and why:
            raise Fault(f"{name}={value}: {why}.")
        hint = f"; {why}" if why else ""
        raise Fault(f"{name}={_plain(value)} is not allowed: it must be {_wanted(value, allowed)}{hint}.")


def _wanted(value: Any, allowed: Allowed) -> str:
    """What is allowed, in words; of infinity a bound alone doesn't say it."""
    endless = isinstance(value, float) and not math.isfinite(value) and "finite" not in allowed.says
    return f"a finite number, {allowed.says}" if endless else allowed.says


def _plain(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
