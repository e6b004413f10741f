"""Networks, objectives and sources of tiles are plug-ins: a class named by ``_target_``, whose keyword-only arguments
are its settings.

A new model, objective or source is one new file with such a class and one YAML file that names it; nothing else is
edited. The schema that Hydra's values are checked against is read off the constructor.

What a person writes on the command line or in a file of theirs may name any class. What is read from a run's folder may
be anybody's: it names classes of this project, or of packages that the command allows by name
(``allow_plugins=[package]``).
"""

import dataclasses
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, Unpack, get_args, get_origin, get_type_hints

import torch
from torch import nn

from data.fault import Fault

Plugin = dict[str, Any]
"""The type of a configuration node that holds a plug-in: ``_target_`` and the settings of that class."""

T = TypeVar("T")
OUR_PACKAGES = ("data", "models", "pretrain", "launch")


def may_be_run(target: str, allowed: Collection[str] | None) -> bool:
    """Whether a class is the user's own choice, or of a package of ours or of those ``allowed``."""
    return allowed is None or any(target.startswith(f"{package}.") for package in (*OUR_PACKAGES, *allowed))


def locate_class(target: str, base: type[T] = nn.Module, allowed: Collection[str] | None = None) -> type[T]:  # type: ignore[assignment]
    """The class that a dotted path such as ``models.vit.VisionTransformer`` names; Fault unless it is a ``base``, and
    of its ``stage`` where it has one.

    Where the path is from a run's folder, ``allowed`` are the packages and modules that may be imported beside ours;
    None: it is the user's own. Those are not looked for in the current folder, unless PYTHONPATH names it.
    """
    if not isinstance(target, str):
        raise Fault(f"_target_: {target} names no class: give the dotted path of one, as models.vit.VisionTransformer.")
    if not may_be_run(target, allowed):
        package = target.partition(".")[0]
        raise Fault(
            f"_target_: {target} was read from a run's folder, and is no class of this project:"
            f" allow_plugins=[{package}] lets the code of {package} be run, if you trust it."
        )
    module, _, name = target.rpartition(".")
    try:
        with nullcontext() if allowed is None else _without_current_folder():
            found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        beside = " in a folder that --config-dir or PYTHONPATH names" if allowed is None else " in one of PYTHONPATH"
        raise Fault(
            f"_target_: {target} can't be imported ({error}); give the dotted path of a class, whose file lies{beside}."
        ) from error
    stage, its = getattr(base, "stage", None), getattr(found, "stage", None)
    if stage and its and stage != its:
        raise Fault(
            f"{target} is an objective of 'pretrain {its}': choose one that 'pretrain {stage} --help' lists, objective=…,"
            f" or derive your own from {base.__module__}.{base.__qualname__}."
        )
    if not (inspect.isclass(found) and issubclass(found, base)):
        wanted = (
            "torch nn.Module class, so it can't be a model"
            if base is nn.Module
            else "class"
            if base is object
            else f"{base.__name__}: derive it from {base.__module__}.{base.__qualname__}"
        )
        raise Fault(f"_target_: {target} is no {wanted}.")
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise Fault(
            f"_target_: {target} can't be built, since it lacks {' and '.join(f'{name}()' for name in lacking)}."
        )
    return found


@contextmanager
def _without_current_folder() -> Iterator[None]:
    """While the folder that somebody happens to be in is no place to import from: an empty entry of PYTHONPATH, or
    ``python -m``, makes it one."""
    here, before = Path.cwd(), list(sys.path)
    named = {Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    if here not in (named | {Path(__file__).resolve().parents[2]}):
        sys.path[:] = [entry for entry in before if entry and Path(entry).resolve() != here]
    try:
        yield
    finally:
        sys.path[:] = before


def settings_of(target: str, base: type = nn.Module) -> dict[str, Any]:
    """The keyword-only arguments of the class that ``target`` names, with their types, and those of a TypedDict that it
    unpacks (``**shared: Unpack[Shared]``)."""
    constructor = locate_class(target, base).__init__  # type: ignore[misc]
    hints, parameters = hints_of(constructor), inspect.signature(constructor).parameters
    names = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    names += [name for name in hints if name not in parameters and name != "return"]
    if untyped := [name for name in names if name not in hints]:
        raise Fault(f"_target_: {target} doesn't say what type its {', '.join(untyped)} is of: {untyped[0]}: int, say.")
    return {name: hints[name] for name in names}


def why_unknown(target: str, name: str) -> str | None:
    """Why ``name`` is no setting of the class that ``target`` names although its constructor takes it, or None where it
    doesn't."""
    constructor = locate_class(target, object).__init__  # type: ignore[misc]
    hints, parameters = hints_of(constructor), inspect.signature(constructor).parameters
    by_name = any(p.kind is p.VAR_KEYWORD and (p.annotation is p.empty or p.name in hints) for p in parameters.values())
    if name in parameters or by_name:
        return (
            f"the settings of {target} are the arguments behind a * in its constructor, and {name} isn't one: write it"
            f" as def __init__(self, …, *, {name}: int)."
        )
    return None


def has_default(target: str, name: str) -> bool:
    """Whether the constructor of the class that ``target`` names has a value for a setting."""
    parameter = inspect.signature(locate_class(target, object).__init__).parameters.get(name)  # type: ignore[misc]
    return parameter is not None and parameter.default is not parameter.empty


def hints_of(kind: Any, include_extras: bool = False) -> dict[str, Any]:
    """The types of a dataclass's fields or a constructor's arguments, those of a TypedDict that it unpacks among them.
    Raises Fault for one whose name isn't there when the program runs."""
    try:
        found: dict[str, Any] = {}
        for name, hint in get_type_hints(kind, include_extras=include_extras).items():
            unpacked = get_origin(hint) is Unpack
            found |= hints_of(get_args(hint)[0], include_extras) if unpacked else {name: hint}
        return found
    except NameError as error:
        raise Fault(
            f"the types of {getattr(kind, '__qualname__', kind)} in {kind.__module__} can't be told ({error}): import"
            " what they name, and not under TYPE_CHECKING alone."
        ) from error


def schema(target: str, base: type = nn.Module) -> type:
    """A dataclass of ``_target_`` and the class's keyword-only arguments, all of them required."""
    return dataclasses.make_dataclass(
        locate_class(target, object).__name__ + "Settings", [("_target_", str), *settings_of(target, base).items()]
    )


def takes_list(kind: Any) -> bool:
    """Whether a type of settings is a list, perhaps or null."""
    return list in (get_origin(part) for part in (kind, *get_args(kind)))


def has_plugin_beside(kind: Any) -> bool:
    """Whether a type of settings is a dataclass whose ``_target_`` brings settings of its own."""
    return dataclasses.is_dataclass(kind) and "_target_" in get_type_hints(kind)


def schema_beside(common: type, target: str, optional: bool = False) -> type:
    """The dataclass ``common``, which names its plug-in's ``base``, with the plug-in's own settings beside its fields;
    ``optional`` ones may be null."""
    own = [(name, kind | None if optional else kind) for name, kind in settings_of(target, common.base).items()]  # type: ignore[attr-defined]
    return dataclasses.make_dataclass(common.__name__, own, bases=(common,))


def build(
    settings: Mapping[str, Any], *arguments: Any, base: type = nn.Module, allowed: Collection[str] | None = None
) -> Any:
    """Construct the class that ``settings["_target_"]`` names, with positional ``arguments`` and the other settings;
    see `locate_class`.

    A ValueError of the constructor (widths that don't divide, say) becomes a Fault with the class's name before it; so
    does any error of a class that isn't ours, with its traceback, or without where it only lacks a package.
    """
    target: type = locate_class(settings["_target_"], base, allowed)
    try:
        return target(*arguments, **{key: value for key, value in settings.items() if key != "_target_"})
    except ValueError as error:
        raise Fault(f"{target.__name__}: {error}") from error
    except Exception as error:
        if isinstance(error, Fault) or is_ours(target):
            raise
        if isinstance(error, ModuleNotFoundError):
            raise package_missing(target.__name__, error) from error
        said = traceback.format_exception_only(error)[-1].strip()
        raise Fault(f"{target.__name__} can't be built: {said}; above is where.", trace=own_trace(error)) from error


def package_missing(who: str, error: ModuleNotFoundError) -> Fault:
    """The sentence for a package that a user's class asks for, or Lightning's for it, and that isn't installed."""
    name = f"pip install {error.name}" if error.name else "install it"
    return Fault(f"{who} needs a package that is not there ({' '.join(str(error).split())}): {name}, or leave it out.")


def is_ours(kind: type) -> bool:
    """Whether a class is of this project, and its errors are defects of ours."""
    return kind.__module__.partition(".")[0] in OUR_PACKAGES


def own_trace(error: BaseException) -> str:
    """The traceback of what was called, without the call; for code of the user's own."""
    return "".join(
        traceback.format_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
    )


def build_empty(settings: Mapping[str, Any], *arguments: Any) -> Any:
    """`build` a network without memory for its values, which are given to it later."""
    with torch.device("meta"):
        return build(settings, *arguments)


def lacking(settings: Mapping[str, Any], base: type) -> list[str]:
    """The names of a plug-in's ``settings`` that are null where its class takes none: they were left out."""
    kinds = settings_of(settings["_target_"], base)
    return [name for name, kind in kinds.items() if settings[name] is None and type(None) not in get_args(kind)]


def build_beside(settings: Any, *arguments: Any) -> Any:
    """Construct the plug-in whose settings lie beside the common ones in ``settings``, a `schema_beside` dataclass."""
    own = {name: getattr(settings, name) for name in settings_of(settings._target_, settings.base)}
    return build({"_target_": settings._target_, **own}, *arguments, base=settings.base)
