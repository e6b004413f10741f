"""From the command line to a typed configuration, and back to where every value came from.

``configs/<command>.yaml`` composes a command's values (Hydra: groups, recipes, overrides); the dataclass ``Config`` in
``pretrain/commands/<command>.py`` gives their types. What the schema doesn't know is refused and the nearest name is
suggested, ``+key=`` included, which Hydra alone would let pass.

The group ``launch`` belongs to every command and to no command's ``Config``: where something is computed doesn't change
what.
"""

import dataclasses
import difflib
import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import AnyNode, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from data.fault import Fault
from pretrain.settings import plugins, ranges
from pretrain.settings.shell_words import of_home, readable

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@contextmanager
def of_the_command_line() -> Iterator[None]:
    """A Fault raised inside is a mistake of the command line, by its exit code."""
    try:
        yield
    except Fault as fault:
        fault.code = 2
        raise


@dataclass
class Composed:
    """A command's resolved configuration and the files and overrides that made it."""

    command: str
    tree: DictConfig  # typed and complete
    launch: plugins.Plugin  # the group launch, typed too: where it runs
    files: list[tuple[str, Path]]  # (prefix of its keys, file), weakest first
    overrides: list[str]  # key=value words of the command line
    config_dirs: list[Path]  # the user's own folders of YAML
    left_out: list[str] = field(
        default_factory=list
    )  # settings of another objective, which the recipe has and the chosen one does without

    @property
    def overridden(self) -> set[str]:
        """Keys set on the command line."""
        return {_key(override) for override in self.overrides}

    @property
    def words(self) -> list[str]:
        """The command line's words that say what is computed, and not where."""
        return [word for word in self.overrides if not re.match(r"[+~]*launch[.=]", word)]

    def says_left_out(self) -> str:
        """The sentence about what the recipe sets and the chosen objective does without."""
        return (
            f"the recipe's {', '.join(self.left_out)} are another objective's, and left out: the chosen one has its own values, "
            "which objective.NAME= changes"
        )

    @of_the_command_line()
    def object(self) -> Any:
        """The command's ``Config`` dataclass, nested dataclasses and plain lists and dicts throughout."""
        missing = sorted(OmegaConf.missing_keys(self.tree))
        if missing:
            given = " ".join(f"{key}=…" for key in missing)
            raise Fault(
                f"{', '.join(missing)} must be given: pretrain {self.command} {given} ('pretrain {self.command} --help' explains)."
                f"{_of_constructors(self.tree, missing)}"
            )
        config = importlib.import_module(f"pretrain.commands.{stem(self.command)}").Config
        values = vars(OmegaConf.to_object(self.tree))
        kinds = get_type_hints(config)
        for name, value in values.items():
            if kinds[name] == plugins.Plugin:
                values[name] = vars(value)
            elif kinds[name] is Any:
                values[name] = dataclasses.asdict(value)
        return config(**values)


def stem(command: str) -> str:
    """What the files of a command are called: ``shards verify`` → ``shards_verify``."""
    return command.replace(" ", "_")


@of_the_command_line()
def load(command: str, overrides: list[str], config_dirs: list[Path] | None = None) -> Composed:
    """Compose and check the configuration of ``command``. Raises Fault for anything unknown, mistyped or malformed."""
    if not (CONFIGS / f"{stem(command)}.yaml").exists():
        raise Fault(f"configs/{stem(command)}.yaml is missing from this installation.")
    directories = [CONFIGS, *(config_dirs or [])]
    search = (
        [f"hydra.searchpath=[{','.join(f'file://{folder.resolve()}' for folder in directories[1:])}]"]
        if config_dirs
        else []
    )
    words = [readable(word, _is_text(_hints(command), _key(word))) for word in overrides]
    values, choices = _compose(command, words, search, directories)
    told = [_as_typed(word, values) for word in words]
    if told != words:
        words = told
        values, choices = _compose(command, words, search, directories)
    left_out = _leave_out(command, words, search, directories, values, choices)
    launch = _typed_launch(command, values.pop("launch")) if "launch" in choices else {}
    tree = _typed(command, values)
    _check_ranges(command, tree, launch)
    files = _files(command, choices, directories)
    return Composed(command, tree, launch, files, overrides, directories[1:], left_out)


def _check_ranges(command: str, tree: DictConfig, launch: plugins.Plugin) -> None:
    """Raise Fault for a value that its setting doesn't allow; a value that is still missing isn't one."""
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise Fault(_unresolved(error)) from error
    ranges.check_whole(values, _config(command))  # type: ignore[arg-type]
    if launch:
        ranges.require_allowed({"launch": launch}, {"launch": plugins.Plugin})


def _compose(
    command: str, overrides: list[str], search: list[str], directories: list[Path]
) -> tuple[DictConfig, dict[str, str]]:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3", job_name=stem(command)):
            whole = compose(stem(command), _with_launch(command, overrides) + search, return_hydra_config=True)
    except yaml.YAMLError as error:
        raise Fault(f"a YAML file can't be read: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group that is set to null
        raise Fault(_explain(command, overrides, search, directories, error)) from error
    choices = {
        group: str(choice) for group, choice in whole.hydra.runtime.choices.items() if not group.startswith("hydra/")
    }
    OmegaConf.set_struct(whole, False)
    del whole["hydra"]
    return whole, choices


def _leave_out(
    command: str,
    words: list[str],
    search: list[str],
    directories: list[Path],
    values: DictConfig,
    choices: dict[str, str],
) -> list[str]:
    """Give an objective that the user chose its own values, where the recipe sets those of another one; returns the
    recipe's that are left out."""
    recipe = choices.get("recipe", "None")
    if recipe == "None" or not any(word.startswith("objective=") for word in words):
        return []
    rest = [word for word in words if _key(word) in ("recipe", "scale")]
    if _compose(command, rest, search, directories)[1]["objective"] == choices["objective"]:
        return []
    own = [word for word in words if _key(word).partition(".")[0] in ("objective", "scale")]
    values.objective = _compose(command, [*own, "~recipe"], search, directories)[0].objective
    files = with_parents("recipe", recipe, directories)
    named = {f"{prefix}{name}" for prefix, file in files for name in comments(file)}
    return sorted(name for name in named if name.startswith("objective.") and name not in map(_key, words))


def _with_launch(command: str, overrides: list[str]) -> list[str]:
    """The overrides with the group ``launch`` added to a command's own: ``launch=local`` unless another is chosen.

    A command whose own settings have that name (it computes something about a cluster) runs here. Raises Fault where it
    is to run elsewhere.
    """
    if "launch" in _hints(command):
        for word in overrides:
            if re.fullmatch(r"[+~]*launch(=.*)?", word):
                raise Fault(
                    f"'pretrain {command}' runs here and can't be launched elsewhere, as {word} asks: its launch.nodes= and "
                    "launch.gpus_per_node= only describe the machines of a run."
                )
        return overrides
    chosen = [word for word in overrides if word.startswith("launch=")]
    rest = [word for word in overrides if word not in chosen]
    return [f"+{word}" for word in chosen or ["launch=local"]] + rest


def _hints(command: str) -> dict[str, Any]:
    """The names and types of a command's own settings."""
    return {name: kind for name, kind in get_type_hints(_config(command)).items() if get_origin(kind) is not ClassVar}


def _as_typed(word: str, values: DictConfig) -> str:
    """A word of the command line, in quotes where Hydra would read a number, and its plug-in's setting is text; which
    plug-in, composing said."""
    node, dot, rest = _key(word).partition(".")
    target = OmegaConf.select(values, f"{node}._target_") if dot else None
    if not isinstance(target, str):
        return word
    return readable(word, _is_text(plugins.settings_of(target, object), rest))


def _is_text(kinds: dict[str, Any], key: str) -> bool:
    """Whether a dotted key is a setting of words, of a command's own or of a plug-in's ``kinds``."""
    kind = None
    for part in key.split("."):
        kind = kinds.get(part)
        kinds = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    return bool({str, list[str]} & {kind, *get_args(kind)})


def _config(command: str) -> type:
    """The dataclass of a command's settings."""
    return importlib.import_module(f"pretrain.commands.{stem(command)}").Config  # type: ignore[no-any-return]


def _typed_launch(command: str, values: DictConfig) -> plugins.Plugin:
    """Merge the group ``launch`` into the schema of the class that it names."""
    kind = plugins.schema(values["_target_"], base=object)
    if isinstance(values.get("setup"), str):  # a shell's line is one, whatever words it is of
        values["setup"] = [values["setup"]]
    tree = _merged(command, [("launch", kind)], OmegaConf.create({"launch": values}))
    return vars(OmegaConf.to_object(tree.launch))


def _typed(command: str, values: DictConfig) -> DictConfig:
    """Merge ``values`` into the command's schema, in which each plug-in's node takes the schema of its class."""
    fields, declared = [], ranges.hints(_config(command))
    for name, kind in _hints(command).items():
        loose = kind is Any  # the doctor's data, which may lack what the plug-in can't do without
        kind = ranges.apart(declared[name])[0] if loose else kind
        if kind == plugins.Plugin or plugins.has_plugin_beside(kind):
            node = values.get(name)
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
    return _merged(command, fields, values)


def _merged(command: str, fields: list[tuple[str, Any]], values: DictConfig) -> DictConfig:
    """The values, typed by a schema of these fields. Raises Fault for what it doesn't know, and for values of another
    type."""
    try:
        tree = OmegaConf.structured(dataclasses.make_dataclass("Config", fields))
        _spread_lists(dict(fields), values)
        _expand_home(values)
        return OmegaConf.merge(tree, values)  # type: ignore[return-value]
    except InterpolationResolutionError as error:
        raise Fault(_unresolved(error)) from error
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        if wrong := re.match("Unexpected type annotation: (.*)", str(error)):
            raise Fault(
                f"{key} can't be a setting, since its type is {wrong[1]}: write bool, int, float, str, list[…] or dict[str, …] of these, or a "
                "dataclass, with ' | None' behind it where null is allowed."
            ) from error
        if "not in" in str(error):
            node, _, name = key.rpartition(".")
            target = OmegaConf.select(values, f"{node}._target_") if node else None
            if target is not None and (why := plugins.why_unknown(target, name)):
                raise Fault(f"there is no setting {key!r}: {why}") from error
            raise Fault(
                f"there is no setting {key!r} in 'pretrain {command}'{nearest(key, {known for known in _keys(values) if known != key and not known.startswith(f'{key}.')})}"
            ) from error
        if "is not Optional" in str(error):
            raise Fault(f"{key} can't be null: give a value, or leave it out.") from error
        raise Fault(f"{key}: {str(error).splitlines()[0]}") from error


def _of_constructors(tree: DictConfig, missing: list[str]) -> str:
    """A further sentence where a class's constructor has the values that are missing."""
    for key in missing:
        node, _, name = key.rpartition(".")
        target = OmegaConf.select(tree, f"{node}._target_") if node else None
        if target is not None and plugins.has_default(target, name):
            return f" The defaults of {target.rpartition('.')[2]}'s constructor don't count: every value is in its YAML file."
    return ""


def _unresolved(error: OmegaConfBaseException) -> str:
    """One sentence for a value that refers to something that there isn't."""
    variable = re.search(r"Environment variable '(.*)' not found", str(error))
    said = f"the environment variable {variable[1]} is not set" if variable else str(error).splitlines()[0]
    return f"{error.full_key}: {said}."


def _expand_home(values: DictConfig) -> None:
    """Put the home folder where a text begins with its sign, as a shell does in front of words, but not behind ``=``."""
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
    an open quote."""
    for name, kind in kinds.items():
        value = None if name not in values or OmegaConf.is_missing(values, name) else values[name]
        if list in (get_origin(part) for part in (kind, *get_args(kind))) and isinstance(value, str | int | float):
            one_path = isinstance(value, str) and Path(value).expanduser().exists()  # which may hold spaces
            try:
                values[name] = shlex.split(value) if isinstance(value, str) and not one_path else [value]
            except ValueError as error:
                key = f"{prefix}{name}"
                raise Fault(
                    f"{key}: there is no file {value!r}, and it can't be read as several names ({error}); one name with a quote in it "
                    f'is given as a list: {key}=["{value}"].'
                ) from error
        elif dataclasses.is_dataclass(kind) and isinstance(value, DictConfig):
            _spread_lists(get_type_hints(kind), value, f"{prefix}{name}.")


def _explain(command: str, overrides: list[str], search: list[str], directories: list[Path], error: Exception) -> str:
    """One sentence for Hydra's refusal: the first override whose key or choice is unknown, with the nearest known one."""
    launch = [
        word for word in overrides if word in {f"launch={choice}" for choice in choices_of("launch", directories)}
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3", job_name=stem(command)):
        known = _keys(compose(stem(command), _with_launch(command, launch) + search))
    groups = {folder.name for directory in directories for folder in directory.iterdir() if folder.is_dir()}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as problem:
            first = str(problem).splitlines()[0]
            return f"{text!r} can't be read as key=value ({first}); quote values that hold spaces, commas or braces."
        key, value = override.key_or_group, override.value()
        if key in groups and value is None and not override.is_delete():
            return f"{key}=null is not a choice; '~{key}' leaves the group {key} out."
        if key in groups and isinstance(value, str):
            options = choices_of(key, directories)
            if value not in options:
                return f"there is no {key} {value!r}{nearest(value, set(options))} There are: {', '.join(options)}."
        elif not launch and (others := _launches_with(key, directories)):
            return (
                f"{key} is a setting of {' and of '.join(others)}: give that too, as without it the command runs here."
            )
        elif key not in known and not override.is_add():
            return f"there is no setting {key!r} in 'pretrain {command}'{nearest(key, known)}"
        elif key in known and override.is_add() and not override.is_force_add():
            return f"{key} is a setting already, and + adds one: write {text.lstrip('+')}."
    return " ".join(str(error).split())


def _launches_with(key: str, directories: list[Path]) -> list[str]:
    """The choices of ``launch=`` that have the setting ``key``."""
    found = []
    for choice in choices_of("launch", directories):
        keys = {
            prefix + name for prefix, file in with_parents("launch", choice, directories) for name in comments(file)
        }
        found += [f"launch={choice}"] if key in keys else []
    return found


def _keys(tree: DictConfig, prefix: str = "") -> set[str]:
    """All dotted keys of a configuration, inner ones included."""
    found = set()
    for key in map(str, tree):
        found.add(f"{prefix}{key}")
        if not OmegaConf.is_missing(tree, key) and isinstance(tree[key], DictConfig):
            found |= _keys(tree[key], f"{prefix}{key}.")
    return found


def nearest(key: str, known: set[str]) -> str:
    """The end of a sentence: ``; did you mean 'optim.lr'?``, by the whole dotted name or else by its last part, or a
    full stop."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        leaf = key.rpartition(".")[2]
        by_leaf: dict[str, str] = {}
        for name in sorted(known):
            by_leaf.setdefault(name.rpartition(".")[2], name)
        close = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.5)]
    return f"; did you mean {close[0]!r}?" if close else "."


def choices_of(group: str, directories: list[Path]) -> list[str]:
    """The files that a group offers; one that begins with an underscore is a part of others."""
    found = {file.stem for directory in directories for file in (directory / group).glob("*.yaml")}
    return sorted(name for name in found if not name.startswith("_"))


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _files(command: str, choices: dict[str, str], directories: list[Path]) -> list[tuple[str, Path]]:
    """The YAML files behind a composition, in the order in which they win, with the prefix of their keys."""
    files = [("", CONFIGS / f"{stem(command)}.yaml")]
    # A recipe overrides the groups, and a scale overrides the recipe.
    for group, choice in sorted(choices.items(), key=lambda item: (item[0].startswith("scale"), item[0] == "recipe")):
        name = group.partition("@")[0]
        files += [(prefix, file) for prefix, file in with_parents(name, choice, directories)]
    return files


def with_parents(group: str, choice: str, directories: list[Path]) -> list[tuple[str, Path]]:
    """A choice's files, those it is based on before it, each with the prefix of its keys."""
    for directory in directories:
        file = directory / group / f"{choice}.yaml"
        if file.exists():
            text = file.read_text()
            prefix = "" if "@package _global_" in text else f"{group}."
            parents = [
                entry
                for entry in (yaml.safe_load(text) or {}).get("defaults", [])
                if isinstance(entry, str) and entry != "_self_"
            ]
            return [pair for parent in parents for pair in with_parents(group, parent, directories)] + [(prefix, file)]
    return []


# Where a value comes from ------------------------------------------------------------------------------------------


def as_dictionary(node: DictConfig) -> dict[str, Any]:
    """A configuration's node as a dictionary."""
    values = OmegaConf.to_container(node)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def annotated(composed: Composed) -> str:
    """The whole resolved configuration as YAML, every value followed by its comment and the file that set it."""
    origins: dict[str, str] = {}
    for prefix, file in composed.files:
        name = file.relative_to(CONFIGS) if file.is_relative_to(CONFIGS) else file
        for key, comment in comments(file).items():
            if prefix + key in composed.left_out and file.parent.name == "recipe":
                continue
            meaning = comment or _meaning(origins.get(prefix + key, ""))
            origins[prefix + key] = f"{meaning}  [{name.with_suffix('')}]".strip()
    for key in composed.overridden & set(origins):
        origins[key] = f"{_meaning(origins[key])}  [command line]".strip()
    lines = _lines(composed.tree, origins, "", 0)
    if composed.launch.keys() > {"_target_"}:
        lines += _lines(OmegaConf.create({"launch": composed.launch}), origins, "", 0)
    width = min(56, max((len(line) for line, origin in lines if origin), default=0))
    return "\n".join(f"{line:<{width}}  # {origin}" if origin else line for line, origin in lines)


def comments(file: Path) -> dict[str, str]:
    """The trailing comment of every value in a YAML file, by dotted key (``""`` where it has none)."""
    text = file.read_text()
    lines = text.splitlines()
    return {name: lines[line].partition(" # ")[2].strip() for name, line in places(text).items()}


def places(text: str) -> dict[str, int]:
    """The line of every value in a YAML text, counted from 0, by dotted key."""
    found: dict[str, int] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
                walk(value, f"{name}.")
            else:
                found[name] = key.start_mark.line

    walk(yaml.compose(text) or yaml.MappingNode("", []), "")
    found.pop("defaults", None)
    return found


def ranges_of(composed: Composed) -> dict[str, str]:
    """What each setting may be, in words, by dotted key."""
    values: dict[str, Any] = {"launch": composed.launch, **OmegaConf.to_container(composed.tree)}  # type: ignore[dict-item]
    kinds = {"launch": plugins.Plugin} | ranges.hints(_config(composed.command))
    words: dict[str, str] = {}
    for name, allowed in ranges.declared(values, kinds):
        each = "each " if OmegaConf.is_list(OmegaConf.select(composed.tree, name)) and not allowed.whole else ""
        words[name] = f"{words[name]}, {each}{allowed.says}" if name in words else f"{each}{allowed.says}"
    return words


def _meaning(origin: str) -> str:
    return origin.rpartition("  [")[0]


def _lines(tree: DictConfig, origins: dict[str, str], prefix: str, depth: int) -> list[tuple[str, str]]:
    lines = []
    for key in map(str, tree):
        name, indent = f"{prefix}{key}", "  " * depth
        if OmegaConf.is_missing(tree, key):
            lines.append((f"{indent}{key}: ???", origins.get(name, "")))
            continue
        value = tree[key]
        if isinstance(value, DictConfig) and len(value):
            lines.append((f"{indent}{key}:", ""))
            lines += _lines(value, origins, f"{name}.", depth + 1)
        else:
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            text = yaml.safe_dump(plain, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
            lines.append((f"{indent}{key}: {text}", origins.get(name, "")))
    return lines
