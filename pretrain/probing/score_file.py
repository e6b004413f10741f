"""The JSON file of scores that ``pretrain probe`` writes."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data.fault import Fault


def read_scores(path: Path, way_out: str, known_by: Collection[str] = ("question", "scores")) -> dict[str, Any]:
    """What it holds; ``known_by``: what of it tells that it is one. Raises Fault, with the ``way_out``, for a file that is
    something else."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise Fault(f"{path} exists and isn't JSON: {way_out}") from error
    if not isinstance(found, dict) or not set(known_by) <= found.keys():
        raise Fault(f"{path} exists and holds no scores of 'pretrain probe': {way_out}")
    return found
