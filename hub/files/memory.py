"""Settings of the memory allocator."""

from __future__ import annotations

import ctypes

# These constants come from glibc's malloc.h; they are not used on other systems.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def reuse_memory() -> None:
    """Let glibc keep up to 2 GiB of freed memory for the next tensor; do nothing elsewhere.

    By default glibc asks the system for new memory for every large tensor. The first access to new
    memory can cost as much as computing the tensor.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 24 << 20)  # Logits go back at once: gaps of their size add up.
    mallopt(M_TRIM_THRESHOLD, (2 << 30) - 1)
    mallopt(M_TOP_PAD, 64 << 20)


def release_memory() -> None:
    """Let glibc return memory that is free to the system; do nothing elsewhere.

    After `reuse_memory`, what learning has freed stays beside what is loaded next.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    trim(0)
