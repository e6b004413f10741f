"""What a model card leaves out of a run's settings: the folders and hosts where things lie, of which the last part stays.

data.shards: /disk3/ann/lab7/shards            → shards
init: s3://bucket/weights/vit.pth             → vit.pth
data.members={a:{shards:hospital/shards}}     → data.members={a:{shards:shards}}
"""

import re
from typing import Any

NO_PLACES = ("slide_pattern",)
"""Settings with strokes that are no paths."""

HUB = "hf-hub:"  # its names stay
PATH = re.compile(
    r"'[^']*/[^']*'|\"[^\"]*/[^\"]*\""  # in quotes: with all that a name may hold
    rf"|{HUB}[^\s,'\"\]}})]+"
    r"|(?:[A-Za-z][\w+.-]*://)?[^\s,'\"\[\]{}=:]*/[^\s,'\"\[\]{}]*"
)


def last_part(path: str) -> str:
    """What a path or a URL ends with."""
    return path.rstrip("/").rpartition("/")[2]


def without_folders(text: str) -> str:
    """Words of a command line, or a sentence about a path, in which every path is its last part."""

    def short(found: re.Match[str]) -> str:
        path = found[0]
        if path.startswith(HUB):
            return path
        quote = path[0] if path[0] in "'\"" else ""
        return f"{quote}{last_part(path.strip(quote) if quote else path)}{quote}"

    return PATH.sub(short, text)


def without_places(value: Any, name: str = "") -> Any:
    """Settings in which every path is its last part. A name of a hub (``hf-hub:org/model``) stays."""
    if isinstance(value, dict):
        return {key: without_places(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one, name) for one in value]
    if not isinstance(value, str) or name.endswith(NO_PLACES) or value.startswith(HUB):
        return value
    return last_part(value) or value
