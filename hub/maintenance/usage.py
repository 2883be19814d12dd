"""How much disk the hub takes, and what for."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

from experthub.hub.session import Session

PURPOSES = {
    "objects": "experts, and the archives that tasks are read from",
    "trash": "what hub gc deletes next",
    "drafts": "what is being unpacked",
    "bases": "base models",
    "hf": "what was fetched from model hubs",
    "partial": "downloads that are not complete",
    "tasks": "tasks",
    "results": "scores of earlier evaluations",
    "banks": "experts packed for composing many at once",
    "runs": "training runs, learned coefficients, routers",
    "benchmarks": "environments of the benchmarks",
}


def usage(session: Session) -> dict[str, Any]:
    """Measure the disk space by purpose and by expert.

    Args:
        session: The registry and the store.

    Returns:
        The bytes in total, per folder, and per stored expert: all of its files, and the files that
        no other expert shares.
    """
    store = session.store
    counted: set[tuple[int, int]] = set()  # what is an object, and in `hf` too, is one file
    places = sorted(store.root.glob("*"), key=lambda path: (path.name != "objects", path.name))
    sizes = {path.name: size_of(path, counted) for path in places if path.is_dir()}
    folders = [
        {"folder": name, "bytes": size, "purpose": PURPOSES.get(name, "")}
        for name, size in sizes.items()
    ]
    manifests = {}
    for expert in session.registry.experts():
        identity = store.manifest(expert.digest)
        if identity is not None:
            manifests[expert.reference] = identity
    users: dict[str, set[str]] = {}
    for identity in manifests.values():
        for info in identity.files.values():
            users.setdefault(info.sha256, set()).add(identity.digest)
    experts = [
        {
            "expert": reference,
            "bytes": sum(info.size for info in identity.files.values()),
            "own": sum(i.size for i in identity.files.values() if len(users[i.sha256]) == 1),
        }
        for reference, identity in manifests.items()
    ]
    return {
        "root": str(store.root),
        "bytes": sum(sizes.values()),
        "folders": folders,
        "experts": experts,
    }


def size_of(folder: Path, counted: set[tuple[int, int]] | None = None) -> int:
    """The bytes of all files below a folder, links not followed; those counted already are left out."""
    found, seen = 0, set() if counted is None else counted
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # gone at this moment
                stat = Path(place, name).lstat()
                if S_ISREG(stat.st_mode) and (stat.st_dev, stat.st_ino) not in seen:
                    seen.add((stat.st_dev, stat.st_ino))
                    found += stat.st_size
    return found
