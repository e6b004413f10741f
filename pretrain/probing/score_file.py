"""The JSON file of scores that ``pretrain probe`` writes."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data.fault import Fault

OF_TILES, OF_SLIDES = ("question", "scores"), ("rows", "labels")
"""What tells scores by labels of tiles, and by labels of slides."""


def scores_in(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """A file's scores by labels of tiles, or else of slides; neither where there is no file. Raises Fault for one that
    'pretrain probe' didn't write."""
    if not path.is_file():
        return None, None
    found = read_scores(path, f"write it again with pretrain probe out={path}", OF_TILES, OF_SLIDES)
    return (None, found) if set(OF_SLIDES) <= found.keys() else (found, None)


def read_scores(path: Path, way_out: str, *kinds: Collection[str]) -> dict[str, Any]:
    """What it holds; ``kinds``: what of it tells that it is one of those wanted, `OF_TILES` or `OF_SLIDES`. Raises Fault,
    with the ``way_out``, for a file that is something else."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise Fault(f"{path} exists and isn't JSON: {way_out}") from error
    if not isinstance(found, dict) or not any(set(kind) <= found.keys() for kind in kinds):
        raise Fault(f"{path} exists and holds no scores of 'pretrain probe': {way_out}")
    return found
