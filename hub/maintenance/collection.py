"""Deleting what nothing needs any more: `hub gc`, in two phases, and `hub rm`.

An object is needed by a registry's entry, by a lock file that was written here, or by a process
that holds it.  One that nothing needs, and that has not been used for a while, first goes to the
trash, from where any use brings it back; a later run deletes it.  In doubt it stays.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experthub.hub.errors import UsageError
from experthub.hub.files.atomic import discard, find_drafts, remove
from experthub.hub.files.file_locks import hold_lock, lock_if_unused
from experthub.hub.maintenance.usage import size_of
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.store.leases import COLLECTING, held
from experthub.hub.store.roots import ARCHIVES, locked_digests
from experthub.hub.store.store import TRASH, Store

GRACE = 3600.0
STALE = 7 * 24 * 3600.0  # of a download that nobody goes on with, of a bank that nobody uses
BANKS = "banks"
# Where files and folders appear under their names, besides the tasks.
PLACES = (
    "objects/sha256/*",
    "registry/*",
    "roots",
    "fingerprints",
    "kernels",
    "results/*",
    "hf/*",
    "hf/*/refs",
    "bases",
    "drafts",
    f"{BANKS}/*",
)


@dataclass(frozen=True)
class Collected:
    """What a collection did, or would do.

    trashed, deleted: sha256 -> bytes, of objects.  restored: sha256.  leftovers: file -> bytes.
    """

    trashed: dict[str, int]
    deleted: dict[str, int]
    restored: list[str]
    leftovers: dict[str, int]


def needed(file: Path | None, store: Store) -> set[str]:
    """The sha256 of every object that must stay.

    Raises HubError when something that names objects cannot be read.
    """
    # Leases first: whoever ends meanwhile has entered what it took in before it ended.
    keep = {*ARCHIVES, *held(store.root)}
    registry = Registry.read(file)
    digests = {e.digest for layer in registry.layers for e in layer.content.experts}
    digests |= locked_digests(store.root)
    for digest in digests:
        identity = store.manifest(digest)
        if identity is not None:
            keep |= identity.objects
    return keep


def collect(
    file: Path | None, store: Store, *, grace: float = GRACE, dry_run: bool = False
) -> Collected:
    """Move what nothing needs to the trash, and delete what has been there for long enough.

    file: a registry besides the others.  grace: seconds since an object was last taken in, and then in the trash, before it goes on;
    at 0 both steps are taken at once.  dry_run: only say what would be done.
    """
    found = Collected({}, {}, [], {})
    with hold_lock(store.root / COLLECTING):
        keep, now = needed(file, store), time.time()
        for sha256, path in store.objects().items():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if sha256 not in keep and now - stat.st_mtime >= grace:
                    if not dry_run:
                        _trash(path, store.root / TRASH / sha256)
                    found.trashed[sha256] = stat.st_size
        for path in sorted((store.root / TRASH).glob("*")):
            with contextlib.suppress(FileNotFoundError):  # a use brought it back at this moment
                _empty(path, keep, store, grace, dry_run, found)
        if dry_run and not grace:
            found.deleted.update(found.trashed)
        for path in _leftovers(store.root):
            with contextlib.suppress(FileNotFoundError), lock_if_unused(path) as free:
                if free:
                    size = size_of(path) if path.is_dir() else path.stat().st_size
                    found.leftovers[str(path.relative_to(store.root))] = size
                    if not dry_run:
                        _remove(path)
    return found


def _remove(path: Path) -> None:
    """Delete a leftover; a draft or a bank that it was the last of goes with it."""
    if path.is_dir():
        discard(path)
    else:
        remove(path)
    if path.parent.name.startswith(".") or path.parent.parent.name == BANKS:
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def _trash(path: Path, target: Path) -> None:
    """Its time in the trash starts now; killed in between, it only looks recently used."""
    target.parent.mkdir(exist_ok=True)
    os.utime(path)
    path.rename(target)


def _empty(
    path: Path, keep: set[str], store: Store, grace: float, dry_run: bool, found: Collected
) -> None:
    """Put an object in the trash back if it is needed again; delete it if its time is over."""
    stat = path.stat()
    if path.name in keep:
        if not dry_run:
            path.rename(store.path(path.name))
        found.restored.append(path.name)
    elif time.time() - stat.st_mtime >= grace:
        if not dry_run:
            path.unlink()
        found.deleted[path.name] = stat.st_size


def _leftovers(root: Path) -> Iterator[Path]:
    """What killed processes left half-written, and downloads and banks that nobody uses."""
    places = [folder for pattern in PLACES for folder in sorted(root.glob(pattern))]
    places += [Path(place) for place, _, _ in os.walk(root / "tasks")]
    for folder in places:
        yield from find_drafts(folder)
    downloads = [p for p in (*root.glob("partial/*"), *root.glob("hf/*/.*/*")) if p.is_file()]
    packed = [p for p in root.glob(f"{BANKS}/*/*") if not p.name.startswith(".")]
    for path in sorted([*downloads, *packed]):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= STALE:
                yield path


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
