"""How the process asks the system for memory."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h; on other systems the numbers mean nothing and are not used.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def reuse_memory() -> None:
    """Let glibc keep what is freed, up to 2 GiB, for the next tensor; elsewhere this does nothing.

    By default every large tensor is new memory, and touching it for the first time can cost as
    much as computing what is in it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, (2 << 30) - 1)
    mallopt(M_TOP_PAD, 64 << 20)
