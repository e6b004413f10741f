"""How many files the sources of one process keep open between them: few enough that nothing else in it runs out."""

import resource
import weakref

MOST = 256
FEWEST = 8  # of one holder: with fewer, a file is opened for nearly every tile

_holders: weakref.WeakSet[object] = weakref.WeakSet()


def share_of_open_files(holder: object) -> int:
    """How many files ``holder`` may keep open: all holders of this process together `MOST`, or a quarter of the
    system's limit."""
    _holders.add(holder)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    together = MOST if soft == resource.RLIM_INFINITY else min(MOST, soft // 4)
    return max(FEWEST, together // len(_holders))
