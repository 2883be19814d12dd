"""Checking everything that the hub keeps: every object hashed again, every entry followed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experthub.hub.bases.base_sources import damaged_files, fetch_again, folders_of
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.atomic import walk_files
from experthub.hub.files.digests import sha256_of
from experthub.hub.maintenance.kept import Kept, folders, texts
from experthub.hub.recipes.lock_file import Lock
from experthub.hub.registry.content import Content
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.store.roots import ARCHIVES, lock_files
from experthub.hub.store.store import Store
from experthub.hub.transfer.pull import fetch

THREADS = 4


@dataclass
class Findings:
    """What a check found.

    objects, bytes: checked.  damaged: objects whose content is not that of their name, with what
    uses them.  incomplete: entries that were pulled and lack a file.  absent: entries that were
    not pulled.  orphans: whole objects that no entry uses.  strangers: files that are no objects.
    bases: damaged base models.  folders: damaged tasks, and folders that were fetched, with the
    files in question.  texts: damaged entries and lock files.  repaired: what was damaged or
    incomplete, and is whole again.  problems: why something could not be repaired.
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
        """What is damaged now."""
        everything = [*self.damaged, *self.bases, *self.folders, *self.texts]
        return [name for name in everything if name not in self.repaired]

    @property
    def whole(self) -> bool:
        """Whether everything that is here is what it should be, now."""
        return not self.left

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"whole": self.whole}


def verify(session: Session, file: Path | None = None, *, repair: bool = False) -> Findings:
    """Hash everything that is kept, and follow every registry entry and every lock to its files.

    Args:
        session: The store and the progress callback. The registries are read here, without the
            entries that cannot be read.
        file: A registry file besides the others.
        repair: Fetch what is damaged or incomplete again, from the sources that entries and locks
            name. What cannot be fetched stays as it is.

    Returns:
        What was found, repaired and left.
    """
    store, found = session.store, Findings()
    unreadable = _check_texts(store, found, repair)
    readable = Registry.read(file, without=unreadable)
    session = Session(readable, store, session.device, session.report)
    wrong = _damaged_objects(session, found)
    broken = _follow(_contents(session), wrong, store, found)
    _check_bases(session, found, repair)
    _check_folders(session, found, repair)
    if repair:
        _repair(wrong, broken, session, found)
    return found


def _check_texts(store: Store, found: Findings, repair: bool) -> set[Path]:
    """Read every entry, every lock file, and what says where they are; the paths that are damaged."""
    unreadable = set()
    for text in texts(store.root):
        found.texts.append(text.name)
        if not (repair and _repaired(text, found)):
            unreadable.add(text.path)
    return unreadable


def _check_folders(session: Session, found: Findings, repair: bool) -> None:
    """Hash the files of every task, and of every folder that was fetched from a model hub."""
    for folder in folders(session.store.root, session.report):
        found.folders[folder.name] = folder.wrong
        if repair:
            _repaired(folder, found)


def _repaired(kept: Kept, found: Findings) -> bool:
    try:
        kept.mend()
    except HubError as error:
        found.problems.append(f"{kept.name}: {error.message}")
        return False
    found.repaired.append(kept.name)
    return True


def _contents(session: Session) -> dict[str, Content]:
    """Collect the contents that entries and locks name, by digest; the nearest entry counts."""

    known: dict[str, Content] = {}
    for lock in lock_files(session.store.root):
        with suppress(HubError):  # that it is damaged is said elsewhere
            known |= {member.digest: member.content for member in Lock.read(lock).members}
    for layer in reversed(session.registry.layers):
        known |= {expert.digest: Content.of(expert) for expert in layer.content.experts}
    return known


def _follow(
    known: Mapping[str, Content], wrong: set[str], store: Store, found: Findings
) -> list[Content]:
    """Follow contents to their objects; those that are not whole."""
    used: set[str] = set()
    broken: list[Content] = []
    for content in sorted(known.values(), key=lambda c: c.reference):
        own = content.digest.removeprefix("sha256:")
        identity = None if own in wrong else store.manifest(content.digest)
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
    found.orphans = sorted(set(store.objects()) - used - wrong - ARCHIVES)
    return broken


def _damaged_objects(session: Session, found: Findings) -> set[str]:
    """Hash all objects, several at a time, and return the sha256 of the damaged ones."""
    store = session.store
    objects = store.objects()
    sizes = {sha256: _size(path) for sha256, path in objects.items()}
    total, done = sum(sizes.values()), 0
    with ThreadPoolExecutor(THREADS) as pool:
        for sha256, now in zip(objects, pool.map(_hash, objects.values()), strict=True):
            done += sizes[sha256]
            session.report("hashing objects", done, total)
            if now != sha256 and objects[sha256].is_file():
                found.damaged[sha256] = []
    found.objects, found.bytes = len(objects), total
    files = [str(p.relative_to(store.root)) for p in walk_files(store.root / "objects")]
    shape = re.compile("objects/sha256/[0-9a-f]{2}/[0-9a-f]{62}")
    found.strangers = [name for name in files if not shape.fullmatch(name)]
    return set(found.damaged)


def _size(path: Path) -> int:
    """The bytes of a file; none when it was collected at this moment."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _hash(path: Path) -> str | None:
    """The sha256 of a file; None for one that cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def _check_bases(session: Session, found: Findings, repair: bool) -> None:
    """Hash the files of every base that was fetched."""
    for name, entry in session.registry.bases().items():
        for folder in folders_of(name, entry):
            session.report(f"hashing the base {name}", 0, 0)
            wrong = damaged_files(folder, entry.fingerprint)
            if not wrong:
                continue
            found.bases[name] = wrong
            if repair:
                try:
                    fetch_again(name, entry, folder, session.report)
                except HubError as error:
                    found.problems.append(f"{name}: {error.message}")
                else:
                    found.repaired.append(name)


def _repair(wrong: set[str], broken: list[Content], session: Session, found: Findings) -> None:
    """Replace damaged and missing objects with the content of their sources."""
    store = session.store
    whole: set[str] = set()
    for content in broken:
        try:
            fetch(content, session, frozenset(wrong - whole))
            whole |= store.identity(content.digest).objects
            if content.reference in found.incomplete:
                found.repaired.append(content.reference)
        except HubError as error:
            found.problems.append(f"{content.reference}: {error.message}")
    for sha256 in sorted(wrong & ARCHIVES):  # an archive comes back when it is needed
        store.path(sha256).unlink(missing_ok=True)
    found.repaired += sorted(wrong & (whole | ARCHIVES))
    for sha256 in sorted(wrong - whole - ARCHIVES):
        if not found.damaged[sha256]:
            found.problems.append(f"{sha256[:12]}: nothing says where it came from")


def check(found: Findings) -> None:
    """Raise IntegrityError when something here is not what it should be."""
    if left := found.left:
        raise IntegrityError(
            f"{len(left)} damaged: {', '.join(_short(name) for name in left[:5])}",
            "; ".join(found.problems) or "run hub verify --repair",
        )


def _short(name: str) -> str:
    return name[:12] if re.fullmatch("[0-9a-f]{64}", name) else name
