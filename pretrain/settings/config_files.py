"""The YAML files that a configuration is composed of: which there are, and what they say of every value."""

from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def choices_of(group: str, directories: list[Path]) -> list[str]:
    """The files that a group offers; one that begins with an underscore is a part of others."""
    found = {file.stem for directory in directories for file in (directory / group).glob("*.yaml")}
    return sorted(name for name in found if not name.startswith("_"))


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
