"""Words of the command line as a shell hands them over, made such that Hydra's grammar reads what was meant.

run=Müller (2)=a   →   run='Müller (2)=a'
run=2024_01        →   run='2024_01', where the setting is text: by itself Hydra reads the number 202401
"""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from data.fault import Fault

WORD = re.compile(r"([+~]*[\w.@/-]+)=(.*)", re.DOTALL)

LISTED = re.compile(r"launch\.(after|exclude)=[\w.-]+(,[\w.-]+)+")
"""Commas between values are Hydra's sweeps; numbers of jobs and names of nodes are written like that everywhere
else."""


def readable(word: str, text: bool) -> str:
    """A word that Hydra reads as it is meant; ``text``: its setting is text, whatever the value looks like.

    Raises Fault for a sweep, for Python's None and for settings of Hydra's own. What can't be read at all, as a list
    that isn't closed, is left as it is.
    """
    found = WORD.fullmatch(word)
    if found is None:
        return word
    key, value = found[1], found[2]
    name = key.lstrip("+~")
    if re.match(r"hydra\b", name):
        instead = (
            "--config-dir DIR" if name == "hydra.searchpath" else "run= or out= names the folder that is written to"
        )
        raise Fault(f"{word}: Hydra's own settings have no effect here; {instead}.")
    if value == "None":
        raise Fault(f"{word}: nothing is written null, {key}=null (and the word None in quotes, {key}=\"'None'\").")
    if LISTED.fullmatch(word):
        return f"{key}=[{value}]"
    override = parsed(word)
    if override is None:
        plain_list = re.fullmatch(r"\[([^\[\]{}'\"]*)\]", value)
        if plain_list:
            parts = (part.strip() for part in plain_list[1].split(","))
            return f"{key}=[{','.join(part if parsed(f'x={part}') else quoted(part) for part in parts)}]"
        return word if value[:1] in ("[", "{", "'", '"') else f"{key}={quoted(value)}"
    if override.is_sweep_override():
        raise Fault(
            f"{word}: a list is written in brackets, {key}=[{value}], one value with a comma in quotes,"
            f" {key}=\"'{value}'\", and a run for each value is asked for by --multirun."
        )
    if value[:1] == "{":
        return f"{key}={_kept(value)}"
    if not text:
        return word
    read = override.value()
    if isinstance(read, list) and any(isinstance(item, int | float) for item in read):
        return f"{key}=[{','.join(_as_words(value[1:-1], len(read)))}]"
    return f"{key}={quoted(value)}" if isinstance(read, int | float) else word


def _kept(table: str) -> str:
    """A table in braces, in which numbers that aren't written as they are read are in quotes: 2024_01 is a name, and
    1e3 in quotes a number all the same, where a number is wanted."""
    if "'" in table or '"' in table:
        return table

    def keep(found: re.Match[str]) -> str:
        override = parsed(f"x={found[0]}")
        read = override.value() if override else None
        changed = isinstance(read, int | float) and not isinstance(read, bool) and str(read) != found[0]
        return quoted(found[0]) if changed else found[0]

    return re.sub(r"(?<=[:,\[])[^\s,:{}\[\]]+(?=\s*[,}\]])", keep, table)


def _as_words(inside: str, count: int) -> list[str]:
    """The items of a list as they are written, those in quotes too where nothing else could be meant; Fault where
    commas don't tell."""
    parts = [part.strip() for part in inside.split(",")]
    if len(parts) != count:
        raise Fault(f"[{inside}]: put each of its names that looks like a number in quotes.")
    return [part if part[:1] in ("'", '"') else quoted(part) for part in parts]


def parsed(word: str) -> Override | None:
    """A word as Hydra reads it, or None where it doesn't."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def quoted(value: str) -> str:
    """Any text as Hydra's grammar reads it back: a backslash means something before a quote alone."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def of_home(value: str) -> bool:
    """Whether a text begins with the home folder's sign, which a shell leaves as it is behind ``=``."""
    return value == "~" or value.startswith("~/")


def key_of(override: str) -> str:
    """The dotted key, or the group, that a word of the command line sets."""
    return override.split("=", 1)[0].lstrip("+~")
