"""What is needed besides the registries' entries: what lock files pin, and archives of tasks."""

from __future__ import annotations

import hashlib
from pathlib import Path

from experthub.hub import _yaml
from experthub.hub._files import hub_home, write_text
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.tasks import bigbench

ROOTS = "roots"
ARCHIVES = frozenset({bigbench.SHA256})  # of the store's objects, those that tasks are read from


def remember(lock: Path) -> None:
    """Keep what a lock file pins, for as long as the file exists."""
    place = str(lock.resolve())
    name = hashlib.sha256(place.encode()).hexdigest()[:32]
    write_text(hub_home() / ROOTS / name, place + "\n")


def locked_digests(root: Path) -> set[str]:
    """The digests that the lock files pin; those of files that are gone are forgotten.

    Raises IntegrityError for a lock file that cannot be read: what it pins is not known.
    """
    found: set[str] = set()
    for entry in sorted((root / ROOTS).glob("[0-9a-f]*")):
        lock = Path(entry.read_text(encoding="utf-8").rstrip("\n"))
        if not lock.is_file():
            entry.unlink(missing_ok=True)
            continue
        try:
            found |= set(_digests(_yaml.read(lock).value))
        except HubError as error:
            raise IntegrityError(
                f"cannot tell what {lock} pins: {error.message}", "mend or remove it"
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
