"""Garbage collection: delete content that nothing needs any more, in two steps.

A registry entry, a lock file or a running process may need an object. An object that nothing needs
and that was not used for a while is moved to the trash, from which any use restores it. A later
collection deletes it. If it is unknown what is needed, nothing is deleted.
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
from experthub.hub.maintenance.usage import measure_size
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.store.leases import COLLECTING, read_leases
from experthub.hub.store.objects import TRASH
from experthub.hub.store.roots import ARCHIVES, read_locked_digests
from experthub.hub.store.store import Store
from experthub.hub.tasks.task_files import is_named_by_card

GRACE = 3600.0
STALE = 7 * 24 * 3600.0  # The age in seconds at which unused downloads and banks are deleted.
BANKS = "banks"
# The folders in which drafts of files and folders may be left, besides those of the tasks.
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
class CollectionResult:
    """The result of a collection, or of a dry run.

    Args:
        trashed: The objects that were moved to the trash: sha256 -> bytes.
        deleted: The objects that were deleted: sha256 -> bytes.
        restored: The sha256 of the objects that were moved back from the trash.
        leftovers: The deleted drafts, downloads and banks: path -> bytes.
    """

    trashed: dict[str, int]
    deleted: dict[str, int]
    restored: list[str]
    leftovers: dict[str, int]


def find_needed(file: Path | None, store: Store) -> set[str]:
    """Find the objects that must stay.

    Args:
        file: An additional registry file, which comes before the others.
        store: The store.

    Returns:
        The sha256 of the objects.

    Raises:
        HubError: A registry or a lock file cannot be read.
    """
    # The leases are read first. A process that ends later has written its entries before it ended.
    keep = {*ARCHIVES, *read_leases(store.root)}
    registry = Registry.read(file)
    digests = {e.digest for layer in registry.layers for e in layer.content.experts}
    digests |= read_locked_digests(store.root)
    for digest in digests:
        identity = store.find_identity(digest)
        if identity is not None:
            keep |= identity.objects
    return keep


def collect(
    file: Path | None, store: Store, *, grace: float = GRACE, dry_run: bool = False
) -> CollectionResult:
    """Move objects that nothing needs to the trash, and delete those that were there long enough.

    Args:
        file: An additional registry file, which comes before the others.
        store: The store.
        grace: The number of seconds that an unused object is kept before each of the two steps. At
            0, both steps are taken at once.
        dry_run: Only find out what would be done.

    Returns:
        What was moved, deleted and restored.

    Raises:
        HubError: A registry or a lock file cannot be read, so that it is unknown what is needed.
    """
    found = CollectionResult({}, {}, [], {})
    with hold_lock(store.root / COLLECTING):
        keep, now = find_needed(file, store), time.time()
        for sha256, path in store.list_objects().items():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if sha256 not in keep and now - stat.st_mtime >= grace:
                    if not dry_run:
                        _trash(path, store.root / TRASH / sha256)
                    found.trashed[sha256] = stat.st_size
        for path in sorted((store.root / TRASH).glob("*")):
            with contextlib.suppress(FileNotFoundError):  # Another process restored it.
                _process_trashed(path, keep, store, grace, dry_run, found)
        if dry_run and not grace:
            found.deleted.update(found.trashed)
        for path in _find_leftovers(store.root):
            with contextlib.suppress(FileNotFoundError), lock_if_unused(path) as free:
                if free:
                    size = measure_size(path) if path.is_dir() else path.stat().st_size
                    found.leftovers[str(path.relative_to(store.root))] = size
                    if not dry_run:
                        _remove_leftover(path)
    return found


def _remove_leftover(path: Path) -> None:
    """Delete a leftover, and its folder if that was a draft or held banks and is empty now."""
    if path.is_dir():
        discard(path)
    else:
        remove(path)
    if path.parent.name.startswith(".") or path.parent.parent.name == BANKS:
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def _trash(path: Path, target: Path) -> None:
    """Move an object to the trash, with the present time as the start of its time there."""
    target.parent.mkdir(exist_ok=True)
    os.utime(path)  # If the process is killed here, the object only looks as if it was just used.
    path.rename(target)


def _process_trashed(
    path: Path, keep: set[str], store: Store, grace: float, dry_run: bool, found: CollectionResult
) -> None:
    """Restore an object in the trash that is needed again; delete it if its time is over."""
    stat = path.stat()
    if path.name in keep:
        if not dry_run:
            path.rename(store.path(path.name))
        found.restored.append(path.name)
    elif time.time() - stat.st_mtime >= grace:
        if not dry_run:
            path.unlink()
        found.deleted[path.name] = stat.st_size


def _find_leftovers(root: Path) -> Iterator[Path]:
    """Find the drafts of killed processes, and downloads and banks that were not used for long."""
    places = [folder for pattern in PLACES for folder in sorted(root.glob(pattern))]
    places += [Path(place) for place, _, _ in os.walk(root / "tasks")]
    for folder in places:
        if _is_inside(folder / "x", root):
            yield from (p for p in find_drafts(folder) if not is_named_by_card(p))
    downloads = [p for p in (*root.glob("partial/*"), *root.glob("hf/*/.*/**/*")) if p.is_file()]
    packed = [p for p in root.glob(f"{BANKS}/*/*") if not p.name.startswith(".")]
    for path in sorted(p for p in (*downloads, *packed) if _is_inside(p, root)):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= STALE:
                yield path


def _is_inside(path: Path, root: Path) -> bool:
    """Tell whether no link below the folders at the top of the hub's home leads to a path.

    The user may keep a whole folder, such as `banks`, on another disk.
    """
    parts = path.relative_to(root).parts
    return not any(root.joinpath(*parts[:n]).is_symlink() for n in range(2, len(parts)))


def find_removable(name: str, registry: Registry) -> list[Expert]:
    """Find the entries of an expert in the user's own registry.

    Args:
        name: A reference by name: all versions of `name`, or only `name@2`.
        registry: The registry.

    Returns:
        The entries.

    Raises:
        NotFoundError: No registry has the expert.
        UsageError: Only other registry files have the expert.
    """
    reference = Reference.parse(name)
    known = registry.find_expert(reference)
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
            f"{known.reference} is not in your own registry, but in {layer.path}",
            f"remove the entry from {layer.path}",
        )
    return mine
