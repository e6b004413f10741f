"""Composed values into a command's types: each plug-in's node takes the schema of the class that it names."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import AnyNode, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from data.fault import Fault
from pretrain.settings import plugins, ranges
from pretrain.settings.command_schema import config_class, setting_types
from pretrain.settings.refusals import dotted_keys, in_its_place
from pretrain.settings.shell_words import key_of, of_home, readable


def in_quotes(word: str, values: DictConfig) -> str:
    """A word of the command line, in quotes where Hydra would read a number, and its plug-in's setting is text; which
    plug-in, composing said."""
    node, dot, rest = key_of(word).partition(".")
    target = OmegaConf.select(values, f"{node}._target_") if dot else None
    if not isinstance(target, str):
        return word
    return readable(word, is_text(plugins.settings_of(target, object), rest))


def is_text(kinds: dict[str, Any], key: str) -> bool:
    """Whether a dotted key is a setting of words, of a command's own or of a plug-in's ``kinds``."""
    kind = None
    for part in key.split("."):
        kind = kinds.get(part)
        kinds = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    return bool({str, list[str]} & {kind, *get_args(kind)})


def typed_launch(command: str, values: DictConfig) -> plugins.Plugin:
    """Merge the group ``launch`` into the schema of the class that it names."""
    kind = plugins.schema(values["_target_"], base=object)
    if isinstance(values.get("setup"), str):  # a shell's line is one, whatever words it is of
        values["setup"] = [values["setup"]]
    tree = merged(command, [("launch", kind)], OmegaConf.create({"launch": values}))
    return vars(OmegaConf.to_object(tree.launch))


def typed(command: str, values: DictConfig) -> DictConfig:
    """Merge ``values`` into the command's schema, in which each plug-in's node takes the schema of its class."""
    fields, declared = [], ranges.hints(config_class(command))
    for name, kind in setting_types(command).items():
        loose = kind is Any  # the doctor's data, which may lack what the plug-in can't do without
        kind = ranges.apart(declared[name])[0] if loose else kind
        if kind == plugins.Plugin or plugins.has_plugin_beside(kind):
            node = values.get(name)
            if loose and node is None:  # no choice of its group, where a command does without
                values[name] = None
                fields.append((name, Any))
                continue
            if not isinstance(node, DictConfig) or "_target_" not in node:
                raise Fault(f"{name}._target_ is missing: it names the class to build.")
            target = node["_target_"]
            if kind == plugins.Plugin:
                kind = plugins.schema(target, ranges.base_of(declared[name]))
            else:
                kind = plugins.schema_beside(kind, target, loose)
                for key in plugins.settings_of(target, kind.base) if loose else ():  # type: ignore[attr-defined]
                    if OmegaConf.is_missing(node, key):
                        node[key] = None
        fields.append((name, kind))
    return merged(command, fields, values)


def merged(command: str, fields: list[tuple[str, Any]], values: DictConfig) -> DictConfig:
    """The values, typed by a schema of these fields. Raises Fault for what it doesn't know, and for values of another
    type."""
    try:
        tree = OmegaConf.structured(dataclasses.make_dataclass("Config", fields))
        _spread_lists(dict(fields), values)
        _expand_home(values)
        return OmegaConf.merge(tree, values)  # type: ignore[return-value]
    except InterpolationResolutionError as error:
        raise Fault(unresolved(error)) from error
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        if wrong := re.match("Unexpected type annotation: (.*)", str(error)):
            raise Fault(
                f"{key} can't be a setting, since its type is {wrong[1]}: write bool, int, float, str, list[…] or"
                " dict[str, …] of these, or a dataclass, with ' | None' behind it where null is allowed."
            ) from error
        if "not in" in str(error):
            node, _, name = key.rpartition(".")
            target = OmegaConf.select(values, f"{node}._target_") if node else None
            if target is not None and (why := plugins.why_unknown(target, name)):
                raise Fault(f"there is no setting {key!r}: {why}") from error
            others = {known for known in dotted_keys(values) if known != key and not known.startswith(f"{key}.")}
            raise Fault(f"there is no setting {key!r} in 'pretrain {command}'{in_its_place(key, others)}") from error
        if re.search("is not Optional|Incompatible value 'None'", str(error)):
            raise Fault(f"{key} can't be null: give a value, or leave it out.") from error
        if re.search("'?(List|Dict)Config", str(error)):
            raise Fault(f"{key} is a single value, and neither a list nor a mapping.") from error
        raise Fault(f"{key}: {str(error).splitlines()[0]}") from error


def constructor_defaults_do_not_count(tree: DictConfig, missing: list[str]) -> str:
    """A further sentence where a class's constructor has the values that are missing."""
    for key in missing:
        node, _, name = key.rpartition(".")
        target = OmegaConf.select(tree, f"{node}._target_") if node else None
        if target is not None and plugins.has_default(target, name):
            return (
                f" The defaults of {target.rpartition('.')[2]}'s constructor don't count: every value is in its YAML"
                " file."
            )
    return ""


def unresolved(error: OmegaConfBaseException) -> str:
    """One sentence for a value that refers to something that there isn't."""
    variable = re.search(r"Environment variable '(.*)' not found", str(error))
    said = f"the environment variable {variable[1]} is not set" if variable else str(error).splitlines()[0]
    return f"{error.full_key}: {said}."


def _expand_home(values: DictConfig) -> None:
    """Put the home folder where a text begins with its sign, as a shell does in front of words, but not behind
    ``=``."""
    for key in list(values):
        value = None if OmegaConf.is_missing(values, key) else values._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none():
            _expand_home(value)
        elif isinstance(value, ListConfig) and not value._is_none():
            texts: Any = OmegaConf.to_container(value)
            if any(isinstance(text, str) and of_home(text) for text in texts):
                values[key] = [str(Path(x).expanduser()) if isinstance(x, str) and of_home(x) else x for x in texts]
        elif isinstance(value, AnyNode) and isinstance(text := value._value(), str) and of_home(text):
            values[key] = str(Path(text).expanduser())


def _spread_lists(kinds: dict[str, Any], values: DictConfig, prefix: str = "") -> None:
    """Let one value stand for a list of one, and words for a list of words: ``slides="a.svs b.svs"``. Raises Fault for
    an open quote, and for what is no class in a list of plug-ins."""
    for name, kind in kinds.items():
        value = None if name not in values or OmegaConf.is_missing(values, name) else values[name]
        if kind == list[plugins.Plugin]:
            for one in value if isinstance(value, ListConfig) else [] if value is None else [value]:
                if not isinstance(one, DictConfig):
                    known = one if isinstance(one, str) else "dotted.path.Of"
                    raise Fault(
                        f"{prefix}{name}: {one!r} is no class with its settings: write [{{_target_: {known}}}], or [] for"
                        " none."
                    )
        elif kind == list[Any] and isinstance(value, DictConfig):  # a plug-in among words
            values[name] = [value]
        elif plugins.takes_list(kind) and isinstance(value, str | int | float):
            one_path = isinstance(value, str) and Path(value).expanduser().exists()  # which may hold spaces
            try:
                values[name] = shlex.split(value) if isinstance(value, str) and not one_path else [value]
            except ValueError as error:
                key = f"{prefix}{name}"
                raise Fault(
                    f"{key}: there is no file {value!r}, and it can't be read as several names ({error}); one name with"
                    " a quote in it "
                    f'is given as a list: {key}=["{value}"].'
                ) from error
        elif dataclasses.is_dataclass(kind) and isinstance(value, DictConfig):
            _spread_lists(get_type_hints(kind), value, f"{prefix}{name}.")
