"""A plan is made of a run's own settings: those of 'pretrain tile' or 'pretrain slide', written beside the plan's."""

from pathlib import Path

import yaml

from data.fault import Fault
from pretrain.run.progress import say
from pretrain.settings.composition import Composed, load, of_the_command_line
from pretrain.settings.config_files import CONFIGS

STAGES = ("tile", "slide")
PLANNED = ("model", "objective", "optim", "trainer", "watch")  # what a plan needs whole; of the data it needs no place


def set_run_words_aside(overrides: list[str], config_dirs: list[Path]) -> list[str]:
    """The plan's own words, and one word, ``settings=[…]``, of those that are a run's."""
    own, theirs = _keys("plan"), {key for stage in STAGES for key in _keys(stage)}
    of_the_run = [word for word in overrides if (key := _first(word)) in theirs and key not in own]
    rest = [word for word in overrides if word not in of_the_run]
    return [*rest, f"settings={_quoted(of_the_run)}", f"config_dirs={_quoted([str(path) for path in config_dirs])}"]


@of_the_command_line()
def compose_run(settings: list[str], config_dirs: list[str]) -> Composed:
    """The configuration of the run that these settings describe, of the stage that its recipe is for. Raises Fault for
    what it refuses."""
    folders = [Path(folder) for folder in config_dirs]
    recipe = [word for word in settings if _first(word) in ("recipe", "scale")]
    refused = []
    for stage in STAGES:
        try:
            load(stage, recipe, folders)
        except Fault as fault:
            refused.append(f"as 'pretrain {stage}': {fault}")
        else:
            composed = load(stage, settings, folders)
            composed.require_given(*PLANNED)
            if composed.left_out:
                say(composed.says_left_out())
            return composed
    raise Fault(f"{' '.join(recipe)} fits no stage: {' '.join(refused)}")


def _first(word: str) -> str:
    return word.partition("=")[0].lstrip("+~").partition(".")[0].partition("@")[0]


def _keys(command: str) -> set[str]:
    """A command's settings and groups of settings, the first part of their names."""
    values = yaml.safe_load((CONFIGS / f"{command}.yaml").read_text())
    groups = {
        key.split()[-1].lstrip("/") for entry in values.get("defaults", []) if isinstance(entry, dict) for key in entry
    }
    return set(values) - {"defaults"} | groups


def _quoted(words: list[str]) -> str:
    """A list as Hydra's command line reads it."""
    escaped = (word.replace("\\", "\\\\").replace("'", "\\'") for word in words)
    return "[" + ",".join(f"'{word}'" for word in escaped) + "]"
