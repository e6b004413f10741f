"""Numbers as other programs write them beside their arrays: ``20``, ``[20]``, ``b"20x"``, ``[4.0, 4.001]`` of two
axes."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from data.fault import Fault

DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
SAME_AXES = 0.01  # by how much the numbers of two axes may differ: levels have whole numbers of pixels


def stated_number(path: Path, name: str, value: Any) -> float | None:
    """What ``path`` says of ``name`` as a number. None where that is nothing: 0, not a number, empty. Raises Fault
    where it can't be one."""
    if value is None:
        return None
    values = np.atleast_1d(np.asarray(value)).ravel()
    if len({str(item) for item in values}) > 1 and not (
        values.dtype.kind in "fiu" and np.isclose(values, values[0], rtol=SAME_AXES, atol=0).all()
    ):
        raise Fault(f"{path} says {name} = {values.tolist()}, where one number belongs.")
    if not len(values):
        return None
    said = text(values[0]).strip()
    if not said:
        return None
    match = re.fullmatch(rf"({DECIMAL.pattern}|-?inf|nan)\s*(?:x|×|px|um|µm)?", said, re.IGNORECASE)
    if not match:
        raise Fault(f"{path} says {name} = {said!r}, where a number belongs.")
    found = float(match[1])
    if found < 0:
        raise Fault(f"{path} says {name} = {said}, which can't be.")
    return found if 0 < found < float("inf") else None


def decimal(said: str) -> float:
    """A number in a table or a JSON, as people write it. Raises ValueError for what only Python takes for one: 0_5, ٣,
    infinity."""
    if not DECIMAL.fullmatch(said.strip()):
        raise ValueError(f"{said!r} is no number")
    return float(said)


def text(value: Any) -> str:
    """The first of some words, ours or bytes; empty where there is none."""
    value = np.atleast_1d(np.asarray(value)).ravel()[:1].tolist()
    return (
        value[0].decode(errors="replace") if value and isinstance(value[0], bytes) else str(value[0]) if value else ""
    )
