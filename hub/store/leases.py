"""Leases list the objects that running processes need, so that no collection deletes them."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from experthub.hub.files.atomic import sweep
from experthub.hub.files.file_locks import hold_lock, lock_if_unused

LEASES, COLLECTING = "leases", "locks/collecting"
RECEIVED = "drafts/received"  # Drafts of what is copied into the store begin with this path.


@dataclass(frozen=True)
class Lease:
    """The file in which this process lists the objects that it needs.

    The file stays open and locked until the process ends.

    Args:
        file: The open file.
        held: The sha256 of the objects that the file lists.
    """

    file: IO[bytes]
    held: set[str] = field(default_factory=set)

    @property
    def exists(self) -> bool:
        """True unless the file was deleted."""
        return bool(os.fstat(self.file.fileno()).st_nlink)

    def add(self, objects: set[str]) -> None:
        """Add objects to the list.

        Args:
            objects: The sha256 of the objects.
        """
        new = sorted(objects - self.held)
        self.file.write("".join(f"{sha256}\n" for sha256 in new).encode())
        self.file.flush()
        self.held.update(new)


# The leases of this process by the root folder of the store.
_own_leases: dict[Path, Lease] = {}


@contextmanager
def hold_lease(root: Path) -> Iterator[Lease]:
    """Open this process's lease. No collection runs during the block.

    The first call also removes the leases of dead processes, and the copies that they left.

    Args:
        root: The root folder of the store.

    Yields:
        The lease, to which objects can be added.
    """
    own = _own_leases.get(root)
    with hold_lock(root / COLLECTING, shared=own is not None and own.exists):
        own = _own_leases.get(root)
        if own is None or not own.exists:
            before = own.held if own else set()
            for _ in read_leases(root):
                pass
            sweep(root / RECEIVED)
            own = _create_lease(root)
            own.add(before)
            _own_leases[root] = own
        yield own


def _create_lease(root: Path) -> Lease:
    """Create and lock the lease file of this process."""
    folder = root / LEASES
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{os.getpid()}-{secrets.token_hex(8)}").open("xb")
    fcntl.flock(file, fcntl.LOCK_EX)
    return Lease(file)


def read_leases(root: Path) -> Iterator[str]:
    """Yield the objects that living processes need, and remove the leases of dead processes.

    The caller holds the lock `COLLECTING`, so that no process creates a lease meanwhile.

    Args:
        root: The root folder of the store.

    Yields:
        The sha256 of the objects.
    """
    for path in sorted((root / LEASES).glob("*")):
        with suppress(FileNotFoundError), lock_if_unused(path) as dead:
            if dead:
                path.unlink()
            else:
                yield from re.findall(
                    r"^[0-9a-f]{64}$", path.read_text("ascii", errors="replace"), re.M
                )
