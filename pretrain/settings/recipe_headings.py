"""What the files of a recipe say of it in sentences: where it differs from what was published, and which values nobody
knows."""

import re
from pathlib import Path

from pretrain.settings.config_files import CONFIGS, comments, with_parents

DEVIATIONS = re.compile(
    r"(?:Left out|Differs): .*?(?=(?: |^)(?:Left out|Differs|Tiles|Data|Cost|Public): |$)"
)  # in a heading
OUR_CHOICE = "?:"  # how a recipe marks a value that is our choice


def heading(file: Path) -> list[str]:
    """The comment at the top of a recipe's file, without Hydra's line."""
    lines = file.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line for line in lines[:first] if "@package" not in line]


def deviations(name: str) -> list[str]:
    """The sentences about where a recipe of ours differs from what was published, its own first: what a recipe stands on
    deviates for it too. None where there is no such recipe."""
    files = [file for _, file in reversed(with_parents("recipe", name, [CONFIGS]))]
    headings = (" ".join(line.removeprefix("# ") for line in heading(file)) for file in files)
    return [said for one in headings for said in DEVIATIONS.findall(one)]


def our_choices(name: str) -> list[str]:
    """The settings of a recipe whose published value isn't known, so that it is our choice."""
    files = with_parents("recipe", name, [CONFIGS])
    said = {key: comment for _, file in files for key, comment in comments(file).items()}
    return sorted(key for key, comment in said.items() if OUR_CHOICE in comment)
