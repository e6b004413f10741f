"""How the C library deals with memory that is freed."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
SHARED = 32 << 20  # bytes up to which tensors share memory: more, and what lies between large ones goes to waste
KEPT = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is asked for next, in place of giving it back to the system.

    A CPU that trains frees and asks for the same tensors in every step, and fresh pages cost it some hundredths of the step.
    Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, SHARED)
        mallopt(M_TRIM_THRESHOLD, KEPT)
