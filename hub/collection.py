"""Deleting what nothing needs any more: `hub gc`, in two phases, and `hub rm`.

An object is needed by a registry's entry, by a lock file that was written here, or by a process
that holds it.  One that nothing needs, and that has not been used for a while, first goes to the
trash, from where any use brings it back; a later run deletes it.  In doubt it stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experthub.hub._files import locked
from experthub.hub.errors import UsageError
from experthub.hub.expert import Expert, Reference
from experthub.hub.registry import Registry, entry_path
from experthub.hub.roots import ARCHIVES, locked_digests
from experthub.hub.store import COLLECTING, LEASES, TRASH, Store

GRACE = 3600.0
STALE = 7 * 24 * 3600.0  # of a download that nobody goes on with


@dataclass(frozen=True)
class Collected:
    """What a collection did, or would do.

    trashed, deleted: sha256 -> bytes, of objects.  restored: sha256.  leftovers: file -> bytes.
    """

    trashed: dict[str, int]
    deleted: dict[str, int]
    restored: list[str]
    leftovers: dict[str, int]


def needed(registry: Registry, store: Store) -> set[str]:
    """The sha256 of every object that must stay.

    Raises IntegrityError when something that names objects cannot be read.
    """
    digests = {e.digest for layer in registry.layers for e in layer.content.experts}
    digests |= locked_digests(store.root)
    keep = {*ARCHIVES, *_held(store)}
    for digest in digests:
        identity = store.manifest(digest)
        if identity is not None:
            keep |= identity.objects
    return keep


def _held(store: Store) -> Iterator[str]:
    """What living processes hold; the leases of dead ones are removed."""
    for path in sorted((store.root / LEASES).glob("*")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as lease:
            try:
                fcntl.flock(lease, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield from re.findall(r"^[0-9a-f]{64}$", lease.read().decode("ascii"), re.M)
            else:
                path.unlink()


def collect(
    registry: Registry, store: Store, *, grace: float = GRACE, dry_run: bool = False
) -> Collected:
    """Move what nothing needs to the trash, and delete what has been there for long enough.

    grace: seconds since an object was last taken in, and then in the trash, before it goes on;
    at 0 both steps are taken at once.  dry_run: only say what would be done.
    """
    found = Collected({}, {}, [], {})
    with locked(store.root / COLLECTING):
        keep, now = needed(registry, store), time.time()
        for sha256, path in store.objects().items():
            stat = path.stat()
            if sha256 not in keep and now - stat.st_mtime >= grace:
                found.trashed[sha256] = stat.st_size
                if not dry_run:
                    _trash(path, store.root / TRASH / sha256)
        for path in sorted((store.root / TRASH).glob("*")):
            stat = path.stat()
            if path.name in keep:
                found.restored.append(path.name)
                if not dry_run:
                    path.rename(store.path(path.name))
            elif time.time() - stat.st_mtime >= grace:
                found.deleted[path.name] = stat.st_size
                if not dry_run:
                    path.unlink()
        if dry_run and not grace:
            found.deleted.update(found.trashed)
        for path in _leftovers(store.root, max(grace, 60.0)):
            found.leftovers[str(path.relative_to(store.root))] = path.stat().st_size
            if not dry_run:
                path.unlink()
                if path.parent.name.startswith("."):  # a draft: it goes with its last file
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()
    return found


def _trash(path: Path, target: Path) -> None:
    """Its time in the trash starts now; killed in between, it only looks recently used."""
    target.parent.mkdir(exist_ok=True)
    os.utime(path)
    path.rename(target)


def _leftovers(root: Path, grace: float) -> Iterator[Path]:
    """Files that a killed process left half-written, and downloads that nobody goes on with."""
    now = time.time()
    for path in [*root.glob("objects/sha256/*/.*"), *root.glob("registry/*/.*")]:
        if now - path.stat().st_mtime >= grace:
            yield path
    for path in [*root.glob("partial/*"), *root.glob("hf/*/.*/*")]:
        if path.is_file() and now - path.stat().st_mtime >= STALE and not _in_use(path):
            yield path


def _in_use(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def removable(name: str, registry: Registry) -> list[Expert]:
    """The versions of an expert, or the one named, in the user's own registry.

    Raises NotFoundError for an unknown one, UsageError for one that only another file knows.
    """
    reference = Reference.parse(name)
    known = registry.expert(reference)
    mine = [
        e
        for e in registry.user.content.experts
        if e.name == reference.name
        and reference.version in (None, e.version)
        and e.digest.startswith(reference.digest)
    ]
    if not mine:
        layer = next(x for x in registry.layers if known in x.content.experts)
        raise UsageError(
            f"{known.reference} is not in your own registry",
            f"it is an entry of {layer.path}: remove it there",
        )
    return mine


def remove(experts: Sequence[Expert]) -> None:
    """Take experts out of the user's own registry; their content stays until it is collected."""
    for expert in experts:
        path = entry_path(expert)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()
