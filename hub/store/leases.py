"""Leases: what running processes need, so that a collection leaves it alone."""

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

from experthub.hub.files.file_locks import hold_lock, lock_if_unused

LEASES, COLLECTING = "leases", "locks/collecting"


@dataclass(frozen=True)
class Lease:
    """The file that says what this process needs; it stays open, and locked, until the process ends."""

    file: IO[bytes]
    held: set[str] = field(default_factory=set)

    @property
    def here(self) -> bool:
        return bool(os.fstat(self.file.fileno()).st_nlink)

    def add(self, objects: set[str]) -> None:
        """Need these objects, by sha256, too."""
        new = sorted(objects - self.held)
        self.file.write("".join(f"{sha256}\n" for sha256 in new).encode())
        self.file.flush()
        self.held.update(new)


# One per store: this process's, by root folder.
_mine: dict[Path, Lease] = {}


@contextmanager
def lease(root: Path) -> Iterator[Lease]:
    """This process's lease; while inside, nothing is collected.

    The first time, leases of dead processes are removed.
    """
    mine = _mine.get(root)
    known = mine is not None and mine.here
    with hold_lock(root / COLLECTING, shared=known):
        mine = _mine.get(root)
        if mine is None or not mine.here:
            before = mine.held if mine else set()
            for _ in held(root):
                pass
            mine = _new(root)
            mine.add(before)
            _mine[root] = mine
        yield mine


def _new(root: Path) -> Lease:
    folder = root / LEASES
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{os.getpid()}-{secrets.token_hex(8)}").open("ab")
    fcntl.flock(file, fcntl.LOCK_EX)
    return Lease(file)


def held(root: Path) -> Iterator[str]:
    """What living processes need; the leases of dead ones are removed.  Nobody may get one meanwhile."""
    for path in sorted((root / LEASES).glob("*")):
        with suppress(FileNotFoundError), lock_if_unused(path) as dead:
            if dead:
                path.unlink()
            else:
                yield from re.findall(r"^[0-9a-f]{64}$", path.read_text("ascii"), re.M)
