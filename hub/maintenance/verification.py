"""Verification: hash every object again, and follow every entry to its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from experthub.hub.bases.base_sources import list_damaged_files, list_own_folders
from experthub.hub.bases.converted import fetch_again, list_converted_folders
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files import checksummed_text
from experthub.hub.files.atomic import sweep, walk_files
from experthub.hub.files.digests import sha256_of
from experthub.hub.maintenance.damage import DamagedItem, find_damaged_folders, find_damaged_texts
from experthub.hub.recipes.lock_file import Lock
from experthub.hub.registry.content import Content
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.store.leases import RECEIVED
from experthub.hub.store.roots import ARCHIVES, list_lock_files
from experthub.hub.store.store import Store
from experthub.hub.transfer.pull import fetch

THREADS = 4


@dataclass
class Findings:
    """The result of a verification.

    Args:
        objects: The number of objects that were hashed.
        bytes: The sum of their sizes.
        damaged: The damaged objects, each with the references of the experts that use it.
        incomplete: The references of experts that were pulled and lack a file.
        absent: The references of experts that were not pulled.
        orphans: The intact objects that no entry uses.
        strangers: The files in the folder of the objects that are not objects.
        bases: The damaged bases, each with its damaged files.
        folders: The damaged tasks, fetched folders and banks, each with its damaged files.
        texts: The damaged registry entries and lock files.
        repaired: The names from the fields above that were repaired.
        problems: The reasons why repairs failed.
    """

    objects: int = 0
    bytes: int = 0
    damaged: dict[str, list[str]] = field(default_factory=dict)
    incomplete: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    bases: dict[str, list[str]] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """The names of everything that is still damaged."""
        everything = [*self.damaged, *self.bases, *self.folders, *self.texts]
        return [name for name in everything if name not in self.repaired]

    @property
    def whole(self) -> bool:
        """True if nothing is damaged any more."""
        return not self.left

    def record(self) -> dict[str, Any]:
        """Return the findings as plain values.

        Returns:
            The fields by name, and `whole`.
        """
        return asdict(self) | {"whole": self.whole}


def verify(session: Session, file: Path | None = None, *, repair: bool = False) -> Findings:
    """Hash everything that the hub stores, and follow every entry and every lock to its files.

    Args:
        session: The store and the progress callback. The registries are read anew, without the
            entries that cannot be read.
        file: An additional registry file, which comes before the others.
        repair: Fetch damaged and missing content again from the sources that entries and locks
            name. Content that cannot be fetched is left unchanged.

    Returns:
        What was found, what was repaired, and what is still damaged.
    """
    store, found = session.store, Findings()
    unreadable = _check_texts(store, found, repair)
    readable = Registry.read(file, without=unreadable)
    session = Session(readable, store, session.device, session.report)
    wrong = _hash_objects(session, found)
    broken = _follow_contents(_collect_contents(session), wrong, store, found)
    _check_bases(session, found, repair)
    _check_folders(session, found, repair)
    if repair:
        sweep(store.root / RECEIVED)  # A killed repair may have left a copy.
        _repair_objects(wrong, broken, session, found)
    return found


def _check_texts(store: Store, found: Findings, repair: bool) -> set[Path]:
    """Check every entry and every lock file; return the paths of those that cannot be read."""
    unreadable = set()
    for text in find_damaged_texts(store.root):
        found.texts.append(text.name)
        # A text with a matching checksum is as it was written, so its repair only tells what is wrong.
        sealed = checksummed_text.is_sealed(text.path.read_bytes())
        if not ((repair or sealed) and _try_repair(text, found)):
            unreadable.add(text.path)
    return unreadable


def _check_folders(session: Session, found: Findings, repair: bool) -> None:
    """Hash the files of every task, fetched folder and bank."""
    for folder in find_damaged_folders(session.store.root, session.report):
        found.folders[folder.name] = folder.wrong
        if repair:
            _try_repair(folder, found)


def _try_repair(item: DamagedItem, found: Findings) -> bool:
    """Repair an item, and tell whether that succeeded."""
    try:
        item.repair()
    except HubError as error:
        found.problems.append(f"{item.name}: {error.message}")
        return False
    found.repaired.append(item.name)
    return True


def _collect_contents(session: Session) -> dict[str, Content]:
    """Collect the contents that entries and locks name, by digest. The nearest entry wins."""
    known: dict[str, Content] = {}
    for lock in list_lock_files(session.store.root):
        with suppress(HubError):  # `_check_texts` reports it.
            known |= {member.digest: member.content for member in Lock.read(lock).members}
    for layer in reversed(session.registry.layers):
        known |= {expert.digest: Content.from_expert(expert) for expert in layer.content.experts}
    return known


def _follow_contents(
    known: Mapping[str, Content], wrong: set[str], store: Store, found: Findings
) -> list[Content]:
    """Follow contents to their objects, and return the contents with damaged or missing objects."""
    used: set[str] = set()
    broken: list[Content] = []
    for content in sorted(known.values(), key=lambda c: c.reference):
        own = content.digest.removeprefix("sha256:")
        identity = None if own in wrong else store.find_identity(content.digest)
        objects = identity.objects if identity else {own}
        used |= objects
        for sha256 in sorted(objects & wrong):
            found.damaged[sha256].append(content.reference)
        if objects & wrong:
            broken.append(content)
        elif identity is None:
            found.absent.append(content.reference)
        elif not all(sha256 in store for sha256 in objects):
            found.incomplete.append(content.reference)
            broken.append(content)
    found.orphans = sorted(set(store.list_objects()) - used - wrong - ARCHIVES)
    return broken


def _hash_objects(session: Session, found: Findings) -> set[str]:
    """Hash all objects, several at a time, and return the sha256 of the damaged ones."""
    store = session.store
    objects = store.list_objects()
    sizes = {sha256: _measure_size(path) for sha256, path in objects.items()}
    total, done = sum(sizes.values()), 0
    with ThreadPoolExecutor(THREADS) as pool:
        for sha256, now in zip(objects, pool.map(_hash_file, objects.values()), strict=True):
            done += sizes[sha256]
            session.report("hashing objects", done, total)
            if now != sha256 and objects[sha256].is_file():
                found.damaged[sha256] = []
    found.objects, found.bytes = len(objects), total
    files = [str(p.relative_to(store.root)) for p in walk_files(store.root / "objects")]
    shape = re.compile("objects/sha256/[0-9a-f]{2}/[0-9a-f]{62}")
    found.strangers = [name for name in files if not shape.fullmatch(name)]
    return set(found.damaged)


def _measure_size(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if another process moved it to the trash."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _hash_file(path: Path) -> str | None:
    """Return the sha256 of a file, or None if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def _check_bases(session: Session, found: Findings, repair: bool) -> None:
    """Hash the files of every base: those that were fetched, and those in folders of the user."""
    for name, entry in session.registry.list_bases().items():
        near = session.registry.find_base_folder(name)
        for folder in list_own_folders(entry, near):
            session.report(f"hashing the base {name}", 0, 0)
            if not list_damaged_files(folder, entry.fingerprint):
                continue
            found.bases[name] = [str(folder)]
            if repair:
                found.problems.append(f"{name}: restore {folder}, which the hub does not write")
        for folder, source in list_converted_folders(name, entry, near).items():
            session.report(f"hashing the base {name}", 0, 0)
            wrong = list_damaged_files(folder, entry.fingerprint)
            if not wrong:
                continue
            found.bases[name] = wrong
            if repair:
                again = partial(fetch_again, source, entry, folder, near, session.report)
                _try_repair(DamagedItem(folder, name, again), found)


def _repair_objects(
    wrong: set[str], broken: list[Content], session: Session, found: Findings
) -> None:
    """Replace damaged and missing objects with content from their sources."""
    store = session.store
    whole: set[str] = set()
    for content in broken:
        try:
            fetch(content, session, frozenset(wrong - whole))
            whole |= store.read_identity(content.digest).objects
            if content.reference in found.incomplete:
                found.repaired.append(content.reference)
        except HubError as error:
            found.problems.append(f"{content.reference}: {error.message}")
    for sha256 in sorted(wrong & ARCHIVES):  # It is downloaded again when it is needed.
        store.path(sha256).unlink(missing_ok=True)
    found.repaired += sorted(wrong & (whole | ARCHIVES))
    for sha256 in sorted(wrong - whole - ARCHIVES):
        if not found.damaged[sha256]:
            found.problems.append(f"{sha256[:12]}: no entry uses it; run hub gc to delete it")


def raise_if_damaged(found: Findings) -> None:
    """Raise an error if something is still damaged, or if a repair failed.

    Args:
        found: The result of a verification.

    Raises:
        IntegrityError: Something is damaged, or an incomplete expert could not be repaired. The
            message names the first five items.
    """
    left = found.left
    if found.problems:  # Incomplete experts alone are no error, but a failed repair is one.
        left += [name for name in found.incomplete if name not in found.repaired]
    if left:
        what = "item is" if len(left) == 1 else "items are"
        raise IntegrityError(
            f"{len(left)} {what} damaged or incomplete: "
            + ", ".join(_shorten(name) for name in left[:5])
            + "".join(f"; {problem}" for problem in found.problems),
            "fix these problems, and run hub verify --repair again"
            if found.problems
            else "run hub verify --repair",
        )


def _shorten(name: str) -> str:
    """Shorten a sha256 to 12 digits; return any other name unchanged."""
    return name[:12] if re.fullmatch("[0-9a-f]{64}", name) else name
