"""What is needed besides the registries' entries: what lock files pin, and archives of tasks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files import checksummed_text, yaml_files
from experthub.hub.files.atomic import hub_home, write_text
from experthub.hub.tasks import bigbench

ROOTS = "roots"
ARCHIVES = frozenset({bigbench.SHA256})  # of the store's objects, those that tasks are read from


def remember(lock: Path) -> None:
    """Keep what a lock file pins, for as long as the file exists."""
    content = f"{lock.resolve()}\n".encode()
    place = hub_home() / ROOTS / root_name(content)
    if not place.is_file() or place.read_bytes() != content:
        write_text(place, content.decode())


def root_name(content: bytes) -> str:
    """The name of the file that says where a lock file is, by what it says."""
    return hashlib.sha256(content.removesuffix(b"\n")).hexdigest()[:32]


def root_files(root: Path) -> list[Path]:
    """The files that say where lock files are."""
    return sorted((root / ROOTS).glob("[0-9a-f]*"))


def lock_files(root: Path) -> list[Path]:
    """The lock files that are remembered, and are there."""
    places = [e.read_bytes() for e in root_files(root)]
    named = [Path(os.fsdecode(place.removesuffix(b"\n"))) for place in places]
    return [lock for lock in named if "\0" not in str(lock) and lock.is_file()]


def locked_digests(root: Path) -> set[str]:
    """The digests that the lock files pin; those of files that are gone are forgotten.

    Raises IntegrityError for a lock file that cannot be read: what it pins is not known.
    """
    found: set[str] = set()
    for entry in root_files(root):
        content = entry.read_bytes()
        if root_name(content) != entry.name:
            raise IntegrityError(f"{entry} is damaged", "run hub verify --repair")
        lock = Path(content.decode().rstrip("\n"))
        if not lock.is_file():
            entry.unlink(missing_ok=True)
            continue
        try:
            if not checksummed_text.is_whole(lock.read_bytes()):
                raise IntegrityError("it is not as it was written")
            found |= set(_digests(yaml_files.read(lock).value))
        except HubError as error:
            raise IntegrityError(
                f"cannot tell what {lock} pins: {error.message}",
                "run hub verify --repair, or mend or remove it",
            ) from None
    return found


def _digests(value: object) -> list[str]:
    """Every expert's digest in a lock, whatever else the lock says."""
    if isinstance(value, list):
        return [digest for item in value for digest in _digests(item)]
    if not isinstance(value, dict):
        return []
    own = value.get("digest")
    below = [digest for item in value.values() for digest in _digests(item)]
    return [own, *below] if isinstance(own, str) else below
