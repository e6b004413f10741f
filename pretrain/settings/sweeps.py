"""Several runs in one command line, as Hydra writes them.

optim.lr=1e-4,3e-4 seed=range(0,3)   →   six points, the last word's values changing fastest
recipe=choice(small,small_dino), recipe=glob(small*)

Each point's run has a folder of its own below the sweep's: ``<run>/optim.lr=1e-4,seed=0``.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TypeVar

from hydra.core.override_parser.types import ChoiceSweep, Glob

from data.fault import Fault
from pretrain.settings.annotation import as_dictionary
from pretrain.settings.composition import Composed, load, of_the_command_line
from pretrain.settings.config_files import CONFIGS, choices_of
from pretrain.settings.shell_words import LISTED, key_of, parsed

SWEPT = ("tile", "slide")
LONGEST_FOLDER_NAME = 200  # bytes of a folder's name; file systems take 255


Point = TypeVar("Point")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, each a whole command line, by the name of its folder below ``folder``."""

    command: str
    folder: Path
    points: dict[str, Composed]
    words: list[str]  # of its command line


@of_the_command_line()
def sweep_of(command: str, words: list[str], config_dirs: list[Path]) -> Sweep:
    """The runs that the words ask for, all of them checked. Raises Fault where there is nothing to sweep, and for any
    that can't run."""
    if command not in SWEPT:
        raise Fault(f"--multirun is of runs, 'pretrain tile' and 'pretrain slide', and not of 'pretrain {command}'.")
    values = [list(_values(word, config_dirs)) for word in words]
    swept = [place for place, found in enumerate(values) if len(found) > 1]
    keys = [key_of(words[place]) for place in swept]
    if not swept:
        raise Fault("--multirun without a setting of several values is one run: give some, optim.lr=1e-4,3e-4.")
    runs = [found[0] for word, found in zip(words, values, strict=True) if key_of(word) == "run"]
    if not runs or "run" in keys:
        raise Fault("a sweep has one run=, the folder below which each of its runs has its own.")
    folder = Path(str(load(command, [runs[-1]], config_dirs).tree.run))
    if (folder / "config.yaml").is_file():
        raise Fault(f"{folder} is a run, and a sweep's runs lie below a folder of their own: give another run=.")
    fixed = set(map(key_of, words)) - set(keys)
    words_of: dict[str, list[str]] = {}
    written: dict[str, str] = {}
    idle: list[dict[str, str]] = []
    for chosen in product(*values):
        name = _folder_name(told := [chosen[place] for place in swept])
        if name in words_of:  # unlike words, of which a folder's name can't tell the difference
            name = f"{name}-{_digest(told)}"
        written[name] = ",".join(told)
        words_of[name] = [f"run={folder / name}", *(word for word in chosen if key_of(word) != "run")]

    def checked(words_of_run: list[str]) -> Composed:
        composed = load(command, words_of_run, config_dirs, fixed)
        idle.append(composed.unheeded)
        if idle[-1]:
            composed = load(command, [word for word in words_of_run if key_of(word) not in idle[-1]], config_dirs)
        composed.require_given()
        return composed

    points = of_each_point(words_of, checked)
    seen: dict[str, str] = {}
    for name, composed in points.items():
        alike = seen.setdefault(
            json.dumps(as_dictionary(composed.tree) | {"run": None}, sort_keys=True, default=str), name
        )
        if alike != name:
            raise Fault(f"two runs of the sweep are the same, {written[alike]} and {written[name]}: leave one out.")
    if said := [sentence for key, sentence in idle[0].items() if all(key in each for each in idle)]:
        raise Fault(said[0])
    return Sweep(command, folder, points, words)


def of_each_point(points: Mapping[str, Point], look: Callable[[Point], Found]) -> dict[str, Found]:
    """What ``look`` finds of each of a sweep's points. Its Fault is raised as it is where it is every point's, else with the
    first such point's name before it."""
    found: dict[str, Found] = {}
    refused: dict[str, Fault] = {}
    for name, point in points.items():
        try:
            found[name] = look(point)
        except Fault as fault:
            refused[name] = fault
        if refused and (found or len({str(one) for one in refused.values()}) > 1):
            first, its = next(iter(refused.items()))
            of_point = Fault(f"{first}: {its}", its.trace)
            of_point.code = its.code
            raise of_point from its
    if refused:
        raise next(iter(refused.values()))
    return found


def _values(word: str, config_dirs: list[Path]) -> Iterator[str]:
    """A word for each of its values. Raises Fault for values that can't be counted."""
    override = None if LISTED.fullmatch(word) else parsed(word)
    if override is None or not override.is_sweep_override():
        yield word
        return
    key = override.get_key_element()
    value = override.value()
    if isinstance(value, Glob):
        names = choices_of(key_of(word), [CONFIGS, *config_dirs])
        found = value.filter(names)
        if not found:
            raise Fault(f"{word} fits none of {key}: {', '.join(names)}.")
        yield from (f"{key}={name}" for name in found)
    elif isinstance(value, ChoiceSweep) and not re.match(r"\s*(?!choice)[a-z]+\(", text := word.partition("=")[2]):
        choice = re.fullmatch(r"choice\((.*)\)", text.strip(), re.DOTALL)
        yield from (f"{key}={one.strip()}" for one in _apart(choice[1] if choice else text))
    elif override.is_discrete_sweep():
        yield from (f"{key}={one}" for one in override.sweep_string_iterator())
    else:
        raise Fault(f"{word} has no end of values: list some, {key}=0.1,0.2, or {key}=range(1,4).")


def _apart(text: str) -> list[str]:
    """Values as they are written, between commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for before, letter in pairwise(" " + text):
        if quote:
            quote = "" if letter == quote and before != "\\" else quote
        elif letter in "'\"":
            quote = letter
        depth += 0 if quote else (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _folder_name(words: list[str]) -> str:
    """The words that a point is told apart by, as the name of a folder."""
    name = ",".join(re.sub(r"[^\w.=+~-]", "_", word.replace("'", "").replace('"', "")) for word in words)
    if len(name.encode()) <= LONGEST_FOLDER_NAME:
        return name
    return f"{name.encode()[:LONGEST_FOLDER_NAME].decode(errors='ignore')}-{_digest(words)}"


def _digest(words: list[str]) -> str:
    return hashlib.sha256(",".join(words).encode()).hexdigest()[:8]
