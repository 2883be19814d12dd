"""Checks of paths before something is written to them."""

from __future__ import annotations

import shutil
from pathlib import Path

from experthub.hub.errors import ConflictError, HubError, UsageError


def ensure_space(folder: Path, needed: int) -> None:
    """Check that the disk of a folder has enough free space, and 64 MiB to spare.

    Args:
        folder: The folder, which is created if it does not exist.
        needed: The number of bytes to be written.

    Raises:
        HubError: The disk has too little free space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + (64 << 20):
        raise HubError(
            f"{folder} has {free >> 20} MiB free, but {needed >> 20} MiB are needed",
            "free some space, or set HUB_HOME to a folder on a larger disk",
        )


def check_free(folder: Path) -> None:
    """Check that a path is free for a new folder.

    Args:
        folder: A path that does not exist, or an empty folder.

    Raises:
        ConflictError: The path is a file, a link or a folder with content.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConflictError(f"{folder} is in use", "name a new folder")


def check_file(path: Path) -> None:
    """Check that a file can be written to a path: the path is a file or is free.

    Args:
        path: The path of the file.

    Raises:
        UsageError: The path is a folder, or lies below a file.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a file", "name another file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{path}: {above} is not a folder", "name a file in a folder")
