"""Where a command runs: what ``launch=`` chooses.

A launcher is one class in one file, whose keyword-only arguments are the settings in its file in ``configs/launch/``.
"""

import importlib
from abc import ABC, abstractmethod
from pathlib import Path

from pretrain.settings.command_schema import file_stem
from pretrain.settings.composition import Composed
from pretrain.settings.sweeps import Sweep

# Commands that go on in the folder out=, which may hold other things beside; in others out= is a file, or appears when
# it is whole.
WORK_IN_OUT = ("shard", "embed", "curate", "inspect")


class Launcher(ABC):
    """A place to run commands."""

    @abstractmethod
    def launch(self, composed: Composed) -> None:
        """Run the command there, or submit it. Raises Fault where that can't be done."""

    def launch_sweep(self, sweep: Sweep) -> bool:
        """Submit all runs of a sweep together, where the place can; whether it did. Else they run one after the other."""
        return False


def run_here(composed: Composed) -> None:
    """Run the command in this process."""
    importlib.import_module(f"pretrain.commands.{file_stem(composed.command)}").run(composed.object())


def folder_of(composed: Composed) -> Path:
    """The folder that a command works in, for what its launch leaves behind; ``launched/COMMAND`` for one that has
    none."""
    tree = composed.tree
    if tree.get("run"):
        return Path(tree.run)
    if composed.command in WORK_IN_OUT and tree.get("out"):
        return Path(tree.out)
    return Path("launched") / file_stem(composed.command)


def python_arguments(composed: Composed, words: list[str]) -> list[str]:
    """What follows an interpreter's name to run the command: itself in another process, maybe elsewhere.

    ``-P`` keeps folders in the working directory that are called as our packages are from being taken for them.
    """
    folders = [part for folder in composed.config_dirs for part in ("--config-dir", str(folder.resolve()))]
    return ["-P", "-m", "pretrain", *composed.command.split(), *folders, *words]
