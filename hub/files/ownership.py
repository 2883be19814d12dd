"""Files that other users may have put where the hub looks for them: they are not read unasked."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

SAFE = "HUB_SAFE_FOLDERS"  # Folders of other users whose files are read, separated by colons.


class UnsafeFileWarning(UserWarning):
    """A warning that a file of another user is not read."""


def find_danger(path: Path) -> str | None:
    """Find out why a file that was found, and not named, must not be read.

    The file and its folder must belong to the user or to root, and must not be writable by
    everybody. The same holds for the target of a link. Folders in `HUB_SAFE_FOLDERS` are exempt.

    Args:
        path: The path of the file or folder.

    Returns:
        What is wrong, or None.
    """
    safe = [Path(folder).resolve() for folder in os.environ.get(SAFE, "").split(":") if folder]
    target = path.resolve()
    for place in dict.fromkeys((path.absolute(), path.absolute().parent, target, target.parent)):
        if place.parent.resolve() / place.name in safe or place.parent.resolve() in safe:
            continue
        found = place.lstat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user (uid {found.st_uid})"
        if found.st_mode & stat.S_IWOTH and not stat.S_ISLNK(found.st_mode):
            return f"{place} can be changed by every user"
    return None


def is_safe(path: Path, how: str) -> bool:
    """Tell whether a file that was found may be read, and warn if it may not.

    Args:
        path: The path of the file or folder.
        how: How the user can name the file explicitly, as a part of the warning.

    Returns:
        Whether the file may be read.
    """
    danger = find_danger(path)
    if danger:
        warnings.warn(
            f"{path} is not read, because {danger}; to trust it, {how}, "
            f"or set {SAFE}={path.absolute().parent}",
            UnsafeFileWarning,
            stacklevel=2,
        )
    return danger is None
