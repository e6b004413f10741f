"""How many files the sources of one process keep open between them: few enough that nothing else in it runs out."""

import resource
import weakref

MOST_OPEN = 256
FEWEST_OPEN = 8  # of one holder: with fewer, a file is opened for nearly every tile

_holders: weakref.WeakSet[object] = weakref.WeakSet()


def share_of_open_files(holder: object) -> int:
    """How many files ``holder`` may keep open: all holders of this process together `MOST_OPEN`, or a quarter of the
    system's limit."""
    _holders.add(holder)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    together = MOST_OPEN if soft == resource.RLIM_INFINITY else min(MOST_OPEN, soft // 4)
    return max(FEWEST_OPEN, together // len(_holders))
