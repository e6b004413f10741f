"""JSON files of ours, read back: whole and with what belongs in them, or a sentence."""

import json
from pathlib import Path
from typing import Any

from data.fault import Fault


def read_object(path: Path, names: set[str], way_out: str) -> dict[str, Any]:
    """The object in a file. Raises Fault with ``way_out`` where the file is damaged, or lacks one of ``names``; OSError
    where there is none."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise Fault(f"{path} is damaged ({' '.join(str(error).split())}): {way_out}.") from error
    if not isinstance(found, dict) or names - found.keys():
        lacks = f"lacks {', '.join(sorted(names - found.keys()))}" if isinstance(found, dict) else "holds no facts"
        raise Fault(f"{path} is damaged (it {lacks}): {way_out}.")
    return found
