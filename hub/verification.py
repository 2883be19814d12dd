"""Checking everything that the hub keeps: every object hashed again, every entry followed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experthub.hub._files import sha256_of
from experthub.hub.base_sources import damaged_files, find, folders_of
from experthub.hub.bases import Report, silent
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.expert import Expert
from experthub.hub.pull import Content, pull
from experthub.hub.registry import Registry
from experthub.hub.roots import ARCHIVES
from experthub.hub.store import Store

THREADS = 4
DAMAGED = "damaged"


@dataclass
class Findings:
    """What a check found.

    objects, bytes: checked.  damaged: objects whose content is not that of their name, with what
    uses them.  incomplete: entries that were pulled and lack a file.  absent: entries that were
    not pulled.  orphans: whole objects that no entry uses.  strangers: files that are no objects.
    bases: damaged base models.  repaired: what was damaged or incomplete, and is whole again.
    problems: why something could not be repaired.
    """

    objects: int = 0
    bytes: int = 0
    damaged: dict[str, list[str]] = field(default_factory=dict)
    incomplete: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    bases: dict[str, list[str]] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether everything that is here is what it should be, now."""
        return not (set(self.damaged) | set(self.bases)) - set(self.repaired)

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"whole": self.whole}


def verify(
    registry: Registry, store: Store, *, repair: bool = False, report: Report = silent
) -> Findings:
    """Hash every object, and follow every registry's entry to its files.

    repair: pull again what is damaged or incomplete, from the sources that its entries name; a
    damaged object is kept under `damaged/` until it is replaced.
    """
    found = Findings()
    wrong = set(_damaged_objects(store, found, report))
    known = {e.digest: e for layer in reversed(registry.layers) for e in layer.content.experts}
    used: set[str] = set()
    broken: dict[str, Expert] = {}
    for expert in sorted(known.values(), key=lambda e: (e.name, e.version)):
        own = expert.digest.removeprefix("sha256:")
        identity = None if own in wrong else store.manifest(expert.digest)
        objects = identity.objects if identity else {own}
        used |= objects
        for sha256 in sorted(objects & wrong):
            found.damaged[sha256].append(expert.reference)
        if objects & wrong:
            broken[expert.digest] = expert
        elif identity is None:
            found.absent.append(expert.reference)
        elif not all(sha256 in store for sha256 in objects):
            found.incomplete.append(expert.reference)
            broken[expert.digest] = expert
    found.orphans = sorted(set(store.objects()) - used - wrong - ARCHIVES)
    _check_bases(registry, found, repair, report)
    if repair:
        _repair(wrong, broken, store, found, report)
    return found


def _damaged_objects(store: Store, found: Findings, report: Report) -> Iterator[str]:
    """Hash all objects, several at a time."""
    objects = store.objects()
    sizes = {sha256: path.stat().st_size for sha256, path in objects.items()}
    total, done = sum(sizes.values()), 0
    with ThreadPoolExecutor(THREADS) as pool:
        for sha256, now in zip(objects, pool.map(_hash, objects.values()), strict=True):
            done += sizes[sha256]
            report("hashing objects", done, total)
            if now != sha256:
                found.damaged[sha256] = []
                yield sha256
    found.objects, found.bytes = len(objects), total
    everything = {p for p in (store.root / "objects").rglob("*") if p.is_file()}
    strange = everything - set(objects.values())
    found.strangers = sorted(str(path.relative_to(store.root)) for path in strange)


def _hash(path: Path) -> str | None:
    """The sha256 of a file; None for one that cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def _check_bases(registry: Registry, found: Findings, repair: bool, report: Report) -> None:
    """Hash the files of every base that was fetched."""
    for name, entry in registry.bases().items():
        for folder in folders_of(name, entry):
            report(f"hashing the base {name}", 0, 0)
            wrong = damaged_files(folder, entry.fingerprint)
            if not wrong:
                continue
            found.bases[name] = wrong
            if repair:
                aside = folder.with_name(f".{folder.name}.{DAMAGED}")
                folder.rename(aside)
                try:
                    find(name, registry, report)
                except HubError as error:
                    found.problems.append(f"{name}: {error.message}")
                    aside.rename(folder)
                else:
                    shutil.rmtree(aside)
                    found.repaired.append(name)


def _repair(
    wrong: set[str], broken: dict[str, Expert], store: Store, found: Findings, report: Report
) -> None:
    """Put damaged objects aside, pull what used them, and put back what could not be had."""
    aside = store.root / DAMAGED
    for sha256 in wrong:
        aside.mkdir(exist_ok=True)
        store.path(sha256).rename(aside / sha256)
    for expert in broken.values():
        try:
            pull(Content.of(expert), store, report)
            if expert.reference in found.incomplete:
                found.repaired.append(expert.reference)
        except HubError as error:
            found.problems.append(f"{expert.reference}: {error.message}")
    for sha256 in sorted(wrong):
        if sha256 in store or sha256 in ARCHIVES:  # an archive comes back when it is needed
            (aside / sha256).unlink()
            found.repaired.append(sha256)
            continue
        if not found.damaged[sha256]:
            found.problems.append(f"{sha256[:12]}: nothing says where it came from")
        (aside / sha256).rename(store.path(sha256))


def check(found: Findings) -> None:
    """Raise IntegrityError when something here is not what it should be."""
    left = [s for s in [*found.damaged, *found.bases] if s not in found.repaired]
    if left:
        raise IntegrityError(
            f"{len(left)} damaged: {', '.join(name[:12] for name in left[:5])}",
            "; ".join(found.problems) or "run hub verify --repair",
        )
