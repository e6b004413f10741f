"""The best checkpoint of a run by a score of its own, and when waiting for a better one has been long enough.

    checkpoints/best -> step-00004000     the best-scored checkpoint that there is; it is never swept away

Published models got worse with longer training, by the tasks they were for; their losses didn't tell.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain import checkpoints

Scores = Sequence[tuple[int, float]]
"""(step, score) at each checkpoint, oldest first; higher is better."""


def scores(records: Sequence[dict[str, Any]], name: str, until: int) -> Scores:
    """The scores called ``name`` that a run recorded up to a step; of a step that was recorded twice the later one counts."""
    found = {int(record["step"]): record[name] for record in records if isinstance(record.get(name), int | float)}
    return [(step, float(found[step])) for step in sorted(found) if step <= until and math.isfinite(found[step])]


def best(scored: Scores) -> tuple[int, float]:
    """The step with the highest score, the first of equals, and that score."""
    return max(scored, key=lambda pair: (pair[1], -pair[0]))


def waited(scored: Scores) -> int:
    """How many checkpoints have gone by since the best one."""
    return sum(step > best(scored)[0] for step, _ in scored) if scored else 0


def mark(run: Path, scored: Scores) -> None:
    """Point ``checkpoints/best`` at the best-scored published checkpoint; nothing where none is scored."""
    there = {checkpoints.step_of(path): path for path in checkpoints.published(run)}
    candidates = [pair for pair in scored if pair[0] in there]
    if not candidates:
        return
    link = checkpoints.folder(run) / checkpoints.BEST
    partial = link.with_name(".best")
    partial.unlink(missing_ok=True)
    partial.symlink_to(there[best(candidates)[0]].name)
    os.replace(partial, link)
