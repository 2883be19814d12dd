"""Disk usage of the hub, by purpose and by expert."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

from experthub.hub.session import Session

PURPOSES = {
    "objects": "experts, and the archives that tasks are imported from",
    "trash": "unused objects, which a later hub gc deletes",
    "drafts": "experts that are being unpacked",
    "bases": "base models",
    "hf": "files fetched from model hubs",
    "partial": "incomplete downloads",
    "tasks": "tasks",
    "results": "scores of earlier evaluations",
    "banks": "packed experts of recipes with many experts",
    "runs": "training runs, learned coefficients, routers",
    "benchmarks": "environments of the benchmarks",
    "registry": "your own registry",
    "roots": "paths of lock files",
    "locks": "locks between processes",
    "leases": "objects that running processes use",
    "fingerprints": "cached fingerprints of bases",
    "kernels": "measured kernels",
}


def measure_usage(session: Session) -> dict[str, Any]:
    """Measure the disk space that the hub uses, by folder and by expert.

    Args:
        session: The registry and the store.

    Returns:
        `root`, the root folder, and `bytes`, the total. `folders` lists the bytes and the purpose
        of each folder. `experts` lists for each stored expert the bytes of all its files, and of
        the files that no other expert has.
    """
    store = session.store
    counted: set[tuple[int, int]] = set()  # A file in `hf` may be a hard link to an object.
    places = sorted(store.root.glob("*"), key=lambda path: (path.name != "objects", path.name))
    sizes = {path.name: measure_size(path, counted) for path in places if path.is_dir()}
    folders = [
        {"folder": name, "bytes": size, "purpose": PURPOSES.get(name, "")}
        for name, size in sizes.items()
    ]
    identities = {}
    for expert in session.registry.list_experts():
        identity = store.find_identity(expert.digest)
        if identity is not None:
            identities[expert.reference] = identity
    users: dict[str, set[str]] = {}
    for identity in identities.values():
        for info in identity.files.values():
            users.setdefault(info.sha256, set()).add(identity.digest)
    experts = [
        {
            "expert": reference,
            "bytes": sum(info.size for info in identity.files.values()),
            "own": sum(i.size for i in identity.files.values() if len(users[i.sha256]) == 1),
        }
        for reference, identity in identities.items()
    ]
    return {
        "root": str(store.root),
        "bytes": sum(sizes.values()),
        "folders": folders,
        "experts": experts,
    }


def measure_size(folder: Path, counted: set[tuple[int, int]] | None = None) -> int:
    """Sum the sizes of all files below a folder. Links are not followed.

    Args:
        folder: The folder.
        counted: The device and inode of every file that was counted before. These files are
            skipped, and the files of this folder are added.

    Returns:
        The sum in bytes.
    """
    found, seen = 0, set() if counted is None else counted
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # Another process removed it.
                stat = Path(place, name).lstat()
                if S_ISREG(stat.st_mode) and (stat.st_dev, stat.st_ino) not in seen:
                    seen.add((stat.st_dev, stat.st_ino))
                    found += stat.st_size
    return found
