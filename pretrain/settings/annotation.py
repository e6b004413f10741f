"""Where every value of a configuration comes from, and what it may be, in words."""

from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from pretrain.settings import plugins, ranges
from pretrain.settings.command_schema import config_class
from pretrain.settings.composition import Composed
from pretrain.settings.config_files import CONFIGS, comments


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


def ranges_of(composed: Composed) -> dict[str, str]:
    """What each setting may be, in words, by dotted key."""
    values: dict[str, Any] = {"launch": composed.launch, **OmegaConf.to_container(composed.tree)}  # type: ignore[dict-item]
    kinds = {"launch": plugins.Plugin} | ranges.hints(config_class(composed.command))
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


def as_dictionary(node: DictConfig) -> dict[str, Any]:
    """A configuration's node as a dictionary."""
    values = OmegaConf.to_container(node)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
