"""Roots of the collection besides registry entries: lock files, and the archives of tasks.

The collection keeps what its roots need. The hub remembers the path of every lock file that it
wrote, in a small file of its own.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files import checksummed_text, yaml_files
from experthub.hub.files.atomic import hub_home, open_atomically
from experthub.hub.tasks import bigbench

ROOTS = "roots"
ARCHIVES = frozenset({bigbench.SHA256})  # The objects from which tasks are imported.


def remember_lock(lock: Path) -> None:
    """Keep the content that a lock file pins for as long as the file exists.

    Args:
        lock: The lock file.
    """
    content = os.fsencode(lock.resolve()) + b"\n"
    place = hub_home() / ROOTS / name_root(content)
    if not place.is_file() or place.read_bytes() != content:
        with open_atomically(place) as file:
            file.write(content)


def _parse_path(content: bytes) -> Path:
    """Return the path of the lock file that a file of `remember_lock` holds."""
    return Path(os.fsdecode(content.removesuffix(b"\n")))


def name_root(content: bytes) -> str:
    """Return the name of the file that remembers a lock file. It is a hash of the content.

    Args:
        content: The content of the file: the path of the lock file and a newline.

    Returns:
        The name, 32 hexadecimal digits.
    """
    return hashlib.sha256(content.removesuffix(b"\n")).hexdigest()[:32]


def list_root_files(root: Path) -> list[Path]:
    """List the files that remember lock files.

    Args:
        root: The root folder of the store.

    Returns:
        The paths of the files, sorted.
    """
    return sorted((root / ROOTS).glob("[0-9a-f]*"))


def list_lock_files(root: Path) -> list[Path]:
    """List the remembered lock files that exist.

    Args:
        root: The root folder of the store.

    Returns:
        The paths of the lock files.
    """
    named = [_parse_path(file.read_bytes()) for file in list_root_files(root)]
    return [lock for lock in named if "\0" not in str(lock) and lock.is_file()]


def read_locked_digests(root: Path) -> set[str]:
    """Read the digests that lock files pin, and forget lock files that no longer exist.

    Args:
        root: The root folder of the store.

    Returns:
        The digests of the experts.

    Raises:
        IntegrityError: A lock file cannot be read, so that it is unknown what it pins.
    """
    found: set[str] = set()
    for entry in list_root_files(root):
        content = entry.read_bytes()
        if name_root(content) != entry.name:
            raise IntegrityError(f"{entry} is damaged", "run hub verify --repair")
        lock = _parse_path(content)
        if not lock.is_file():
            entry.unlink(missing_ok=True)
            continue
        try:
            if not checksummed_text.is_whole(lock.read_bytes()):
                raise IntegrityError("its checksum does not match")
            found |= set(_find_digests(yaml_files.read(lock).value))
        except HubError as error:
            raise IntegrityError(
                f"cannot tell what {lock} pins: {error.message}",
                "run hub verify --repair, or correct or remove the file",
            ) from None
    return found


def _find_digests(value: object) -> list[str]:
    """Find every digest in the values of a lock file; ignore all other values."""
    if isinstance(value, list):
        return [digest for item in value for digest in _find_digests(item)]
    if not isinstance(value, dict):
        return []
    own = value.get("digest")
    below = [digest for item in value.values() for digest in _find_digests(item)]
    return [own, *below] if isinstance(own, str) else below
