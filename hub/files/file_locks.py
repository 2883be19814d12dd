"""Locks between processes, held on files; the system releases them when their process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experthub.hub.files.plain_files import open_plain


@contextmanager
def hold_lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold a lock while the block runs; wait until no other process holds it.

    Args:
        path: The lock's file, which is created if it does not exist.
        shared: Allow other processes to share the lock at the same time.

    Yields:
        Nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_plain(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@contextmanager
def lock_if_unused(path: Path) -> Iterator[bool]:
    """Lock a file or folder if it exists and no process holds its lock.

    Args:
        path: The file or folder.

    Yields:
        True if the lock is held while the block runs, so that no other process can take it.
        False if the path does not exist or another process holds its lock.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
