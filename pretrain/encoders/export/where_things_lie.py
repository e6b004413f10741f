"""What a model card leaves out of a run's settings: the folders and hosts where things lie, of which the last part stays.

data.shards: /disk3/ann/lab7/shards      → shards
init: s3://bucket/weights/vit.pth       → vit.pth
"""

import re
from typing import Any

PLACES = (
    *("run", "init", "teacher", "probe", "slide_labels"),
    *("shards", "slides", "files", "grids", "index", "embeddings", "further", "sample"),
)
"""Settings, by their last name, that say where things are."""

NO_PLACES = ("slide_pattern",)
"""Settings that may look like it and are none."""

ABSOLUTE = re.compile(r"(?:[A-Za-z][\w+.-]*://|~?/|\.{1,2}/)")
IN_A_TEXT = re.compile(r"(?<![^\s=:,'\"\[{(])(?:[A-Za-z][\w+.-]*://|~?/|\.{1,2}/)[^\s,'\"\]})]+")


def last_part(path: str) -> str:
    """What a path or a URL ends with."""
    return path.rstrip("/").rpartition("/")[2]


def without_folders(text: str) -> str:
    """A text in which paths that begin at a root, at home or here are their last parts."""
    return IN_A_TEXT.sub(lambda found: last_part(found[0]), text)


def without_places(value: Any, name: str = "") -> Any:
    """Settings in which every path is its last part: in those that say where things are, and wherever a whole value is
    an absolute one. A name of a hub (``hf-hub:org/model``) stays."""
    if isinstance(value, dict):
        return {key: without_places(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one, name) for one in value]
    if not isinstance(value, str) or name.endswith(NO_PLACES):
        return value
    own = name.rpartition(".")[2]
    is_place = own in PLACES and not re.match(r"[A-Za-z][\w-]*:(?!//)", value)
    return last_part(value) or value if is_place or ABSOLUTE.match(value) else value
