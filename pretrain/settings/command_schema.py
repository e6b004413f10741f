"""What a command's own settings are, and the group ``launch`` beside them."""

import importlib
import re
from typing import Any, ClassVar, get_origin, get_type_hints

from data.fault import Fault


def file_stem(command: str) -> str:
    """What the files of a command are called: ``shards verify`` → ``shards_verify``."""
    return command.replace(" ", "_")


def config_class(command: str) -> type:
    """The dataclass of a command's settings."""
    return importlib.import_module(f"pretrain.commands.{file_stem(command)}").Config  # type: ignore[no-any-return]


def setting_types(command: str) -> dict[str, Any]:
    """The names and types of a command's own settings."""
    return {
        name: kind for name, kind in get_type_hints(config_class(command)).items() if get_origin(kind) is not ClassVar
    }


def with_launch(command: str, overrides: list[str]) -> list[str]:
    """The overrides with the group ``launch`` added to a command's own: ``launch=local`` unless another is chosen.

    A command whose own settings have that name (it computes something about a cluster) runs here. Raises Fault where it
    is to run elsewhere.
    """
    if "launch" in setting_types(command):
        for word in overrides:
            if re.fullmatch(r"[+~]*launch(=.*)?", word):
                raise Fault(
                    f"'pretrain {command}' runs here and can't be launched elsewhere, as {word} asks: its launch.nodes="
                    " and launch.gpus_per_node= only describe the machines of a run."
                )
        return overrides
    chosen = [word for word in overrides if word.startswith("launch=")]
    rest = [word for word in overrides if word not in chosen]
    return [f"+{word}" for word in chosen or ["launch=local"]] + rest
