"""Networks and objectives are plug-ins: a class named by ``_target_``, whose keyword-only arguments are its settings.

A new model or objective is one new file with such a class and one YAML file that names it; nothing else is edited. The
schema that Hydra's values are checked against is read off the constructor.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from torch import nn

from data.fault import Fault

Plugin = dict[str, Any]
"""The type of a configuration node that holds a plug-in: ``_target_`` and the settings of that class."""


def locate(target: str) -> type[nn.Module]:
    """The class that a dotted path such as ``models.vit.VisionTransformer`` names; Fault unless it is an nn.Module."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Fault(f"_target_: {target} can't be imported ({error}); give the dotted path of a class.") from error
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise Fault(f"_target_: {target} is not a torch nn.Module class, so it can't be a model or an objective.")
    return found


def schema(target: str) -> type:
    """A dataclass of ``_target_`` and the class's keyword-only arguments, all of them required."""
    constructor = locate(target).__init__
    hints = get_type_hints(constructor)
    names = [p.name for p in inspect.signature(constructor).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return dataclasses.make_dataclass(
        target.rpartition(".")[2] + "Settings", [("_target_", str), *((n, hints[n]) for n in names)]
    )


def build(settings: Mapping[str, Any], *arguments: Any) -> nn.Module:
    """Construct the class that ``settings["_target_"]`` names, with positional ``arguments`` and the other settings.

    A ValueError of the constructor (widths that don't divide, say) becomes a Fault with the class's name before it.
    """
    target = locate(settings["_target_"])
    try:
        return target(*arguments, **{key: value for key, value in settings.items() if key != "_target_"})
    except ValueError as error:
        raise Fault(f"{target.__name__}: {error}") from error
