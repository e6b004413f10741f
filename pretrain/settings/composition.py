"""From the command line to a typed configuration.

``configs/<command>.yaml`` composes a command's values (Hydra: groups, recipes, overrides); the dataclass ``Config`` in
``pretrain/commands/<command>.py`` gives their types. What the schema doesn't know is refused and the nearest name is
suggested, ``+key=`` included, which Hydra alone would let pass.

The group ``launch`` belongs to every command and to no command's ``Config``: where something is computed doesn't change
what.
"""

import dataclasses
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.fault import Fault
from pretrain.settings import plugins, ranges
from pretrain.settings.command_schema import config_class, file_stem, setting_types, with_launch
from pretrain.settings.config_files import CONFIGS, comments, with_parents
from pretrain.settings.merging import (
    constructor_defaults_do_not_count,
    in_quotes,
    is_text,
    typed,
    typed_launch,
    unresolved,
)
from pretrain.settings.refusals import require_no_range_in_a_list, require_of_the_stage, unheeded, why_refused
from pretrain.settings.shell_words import key_of, readable


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
    )  # settings of another objective, network or source, which the recipe has and the chosen one does without
    unheeded: dict[str, str] = field(
        default_factory=dict
    )  # given settings that change nothing, with what to say of each

    @property
    def overridden(self) -> set[str]:
        """Keys set on the command line."""
        return {key_of(override) for override in self.overrides}

    @property
    def words(self) -> list[str]:
        """The command line's words that say what is computed, and not where."""
        return [word for word in self.overrides if not re.match(r"[+~]*launch[.=]", word)]

    def says_left_out(self) -> str:
        """The sentence about what the recipe sets and the chosen objective, network or source does without."""
        groups = sorted({name.partition(".")[0] for name in self.left_out})
        return (
            f"the recipe's {', '.join(self.left_out)} are another {' and '.join(groups)}'s, and left out: the chosen one"
            f" has its own values, which {' or '.join(f'{group}.NAME=' for group in groups)} changes"
        )

    @of_the_command_line()
    def require_given(self, *nodes: str) -> None:
        """Raise Fault for settings that are still to be given: all, or those of some ``nodes``."""
        missing = sorted(
            key for key in OmegaConf.missing_keys(self.tree) if not nodes or key.partition(".")[0] in nodes
        )
        if missing:
            given = " ".join(f"{key}=…" for key in missing)
            raise Fault(
                f"{', '.join(missing)} must be given: pretrain {self.command} {given} ('pretrain {self.command} --help'"
                f" explains).{constructor_defaults_do_not_count(self.tree, missing)}"
            )

    @of_the_command_line()
    def object(self) -> Any:
        """The command's ``Config`` dataclass, nested dataclasses and plain lists and dicts throughout. Raises Fault for
        a setting that is still to be given."""
        self.require_given()
        config = config_class(self.command)
        values = vars(OmegaConf.to_object(self.tree))
        kinds = get_type_hints(config)
        for name, value in values.items():
            if kinds[name] == plugins.Plugin:
                values[name] = vars(value)
            elif kinds[name] is Any and value is not None:
                values[name] = dataclasses.asdict(value)
        return config(**values)


@of_the_command_line()
def load(
    command: str, overrides: list[str], config_dirs: list[Path] | None = None, elsewhere: Collection[str] = ()
) -> Composed:
    """Compose and check the configuration of ``command``. Raises Fault for anything unknown, mistyped or malformed, and
    for a given setting that changes nothing, but for those that a sweep's other runs may heed, ``elsewhere``."""
    if not (CONFIGS / f"{file_stem(command)}.yaml").exists():
        raise Fault(f"configs/{file_stem(command)}.yaml is missing from this installation.")
    directories = [CONFIGS, *(config_dirs or [])]
    # The classes that files there name may lie beside them; last, so that they hide nothing.
    sys.path += [str(folder.resolve()) for folder in directories[1:] if str(folder.resolve()) not in sys.path]
    search = (
        [f"hydra.searchpath=[{','.join(f'file://{folder.resolve()}' for folder in directories[1:])}]"]
        if config_dirs
        else []
    )
    words = [readable(word, is_text(setting_types(command), key_of(word))) for word in overrides]
    values, choices = _compose(command, words, search, directories)
    told = [in_quotes(word, values) for word in words]
    if told != words:
        words = told
        values, choices = _compose(command, words, search, directories)
    require_of_the_stage(command, words, choices, directories)
    left_out = _leave_out(command, words, search, directories, values, choices)
    launch = typed_launch(command, values.pop("launch")) if "launch" in choices else {}
    tree = typed(command, values)
    require_no_range_in_a_list(words, values)
    idle = unheeded(command, words, _checked(command, tree, launch))
    if said := [sentence for key, sentence in idle.items() if key not in elsewhere]:
        raise Fault(said[0])
    files = _files(command, choices, directories)
    return Composed(command, tree, launch, files, overrides, directories[1:], left_out, idle)


def _checked(command: str, tree: DictConfig, launch: plugins.Plugin) -> dict[str, Any]:
    """The values, plain. Raises Fault for one that its setting doesn't allow; a value that is still missing isn't
    one."""
    try:
        values: dict[str, Any] = OmegaConf.to_container(tree, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise Fault(unresolved(error)) from error
    ranges.check_whole(values, config_class(command))
    if launch:
        ranges.require_allowed({"launch": launch}, {"launch": plugins.Plugin})
    return values


def _compose(
    command: str, overrides: list[str], search: list[str], directories: list[Path]
) -> tuple[DictConfig, dict[str, str]]:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3", job_name=file_stem(command)):
            whole = compose(file_stem(command), with_launch(command, overrides) + search, return_hydra_config=True)
    except yaml.YAMLError as error:
        raise Fault(f"a YAML file can't be read: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group that is set to null
        raise Fault(why_refused(command, overrides, search, directories, error)) from error
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
    """Give an objective or a network that the user chose its own values, where the recipe sets those of another one, and
    take from a source of tiles what it doesn't know; returns the recipe's that are left out."""
    recipe = choices.get("recipe", "None")
    if recipe == "None":
        return []
    rest = [word for word in words if key_of(word) in ("recipe", "scale")]
    chosen = [
        group
        for group in ("objective", "model", "data")
        if any(word.startswith(f"{group}=") for word in words)
        and _compose(command, rest, search, directories)[1][group] != choices[group]
    ]
    kept: set[str] = set()
    for group in chosen:
        own = [word for word in words if key_of(word).partition(".")[0] in (group, "scale")]
        alone = _compose(command, [*own, "~recipe"], search, directories)[0][group]
        if group == "data":  # views and batches are those of any source
            for name in values.data.keys() - alone.keys():
                del values.data[name]
            kept = {f"data.{name}" for name in alone}
        else:
            values[group] = alone
    files = with_parents("recipe", recipe, directories)
    named = {f"{prefix}{name}" for prefix, file in files for name in comments(file)}
    of_others = {name for name in named if name.partition(".")[0] in chosen and "." in name}
    of_others -= {name for name in of_others if ".".join(name.split(".")[:2]) in kept}
    return sorted(of_others - set(map(key_of, words)))


def _files(command: str, choices: dict[str, str], directories: list[Path]) -> list[tuple[str, Path]]:
    """The YAML files behind a composition, in the order in which they win, with the prefix of their keys."""
    files = [("", CONFIGS / f"{file_stem(command)}.yaml")]
    # A recipe overrides the groups, and a scale overrides the recipe.
    for group, choice in sorted(choices.items(), key=lambda item: (item[0].startswith("scale"), item[0] == "recipe")):
        name = group.partition("@")[0]
        files += [(prefix, file) for prefix, file in with_parents(name, choice, directories)]
    return files
