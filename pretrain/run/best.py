"""The best checkpoint of a run by a score of its own, and when waiting for a better one has been long enough.

    checkpoints/best -> step-00004000     the best-scored checkpoint that there is; it is never swept away
                                          (a file with its name where there are no symbolic links)

Published models got worse with longer training, by the tasks they were for; their losses didn't tell.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from data.files import unfinished, write_whole
from pretrain.run import checkpoints

Scores = Sequence[tuple[int, float]]
"""(step, score) at each checkpoint, oldest first; higher is better."""


def best(scored: Scores) -> tuple[int, float]:
    """The step with the highest score, the first of equals, and that score."""
    return max(scored, key=lambda pair: (pair[1], -pair[0]))


def waited(scored: Scores) -> int:
    """How many checkpoints have gone by since the best one."""
    return sum(step > best(scored)[0] for step, _ in scored) if scored else 0


def mark(run: Path, scored: Scores) -> None:
    """Point ``checkpoints/best`` at the best-scored published checkpoint; nothing where none is scored."""
    there = {checkpoints.step_of(path): path for path in checkpoints.complete(run)}
    candidates = [pair for pair in scored if pair[0] in there]
    if not candidates:
        return
    name = there[best(candidates)[0]].name
    link = checkpoints.folder(run) / checkpoints.BEST
    if checkpoints.name_of_best(link) == name:
        return
    if link.is_dir() and not link.is_symlink():
        _unlink_copy(link)
    partial = unfinished(link)
    try:
        partial.symlink_to(name)
        os.replace(partial, link)
    except OSError:  # a file system without symbolic links: a file with the name in it
        write_whole(link, name)
    finally:
        partial.unlink(missing_ok=True)


def _unlink_copy(copy: Path) -> None:
    """A run's folder that was copied with links followed holds the best checkpoint twice, or once more, under this
    name: give it its own."""
    own = (
        copy.with_name(f"step-{checkpoints.read_state(copy)['step']:08d}") if checkpoints.damage(copy) is None else None
    )
    if own is None or own.exists():
        shutil.rmtree(copy)
    else:
        copy.rename(own)
