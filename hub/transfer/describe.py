"""Naming what is stored: expert.json in a folder, and the registry's entry."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.errors import NotFoundError
from experthub.hub.files.atomic import format_json, hub_home, write_json, write_text
from experthub.hub.files.digests import digest_of
from experthub.hub.formats.records import validate_record
from experthub.hub.kinds import kinds
from experthub.hub.registry.content import Content
from experthub.hub.registry.entries import (
    check_same_content,
    check_writable,
    next_version,
    register,
)
from experthub.hub.registry.expert import DESCRIPTION, Expert, Identity, relative_source
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.store.folder import read_folder, stated_in
from experthub.hub.transfer.sources import opened


def describe(
    folder: Path,
    name: str,
    base: Base,
    session: Session,
    *,
    task: str | None,
    training: dict[str, Any],
    like: Expert | None = None,
    version: int | None = None,
    description: str = "",
) -> Expert:
    """Describe a freshly trained folder in expert.json, store it, and register it.

    It becomes the next version of the name, unless a version has the same content.

    Args:
        folder: The folder with the trained files.
        name: The name in the registry.
        base: The base that was trained.
        session: The registry and the store.
        task: The task that it was trained on.
        training: The settings and results that expert.json records.
        like: The expert that training started from; its licence, description and tags are kept.
        version: The version to register. The default is the next one of the name.
        description: One line about the expert, if `like` is not given.

    Returns:
        The expert as it is registered.

    Raises:
        ConflictError: The name and version have other content.
    """
    registry = session.registry
    bare = read_folder(folder)
    identity = bare.model_copy(update={"base_fingerprint": base.fingerprint})
    kept: dict[str, Any] = {"description": description}
    if like is not None:
        kept = like.model_dump(include={"license", "description", "tags"})
    expert = Expert(
        name=name,
        version=version or next_version(name, registry.experts()),
        kind=identity.kind,
        base=base.name,
        digest=identity.digest,
        sources=[f"file:{folder}"],
        task=task,
        training=training,
        **kept,
    )
    write_description(folder, expert, identity)
    session.store.add(folder, identity.digest)
    known = [e for e in registry.experts() if (e.name, e.digest) == (name, identity.digest)]
    if version is None and known:
        return known[-1]
    for other in registry.experts():
        if other.reference == expert.reference:
            check_same_content(other, expert)
    register(expert)
    session.refresh()
    return expert


def checkpoint_folder(name: str, key: dict[str, Any]) -> Path:
    """Make the folder for the checkpoints of one training run.

    Args:
        name: The name of the expert that is trained.
        key: The settings, data and weights of the run. Another key has another folder.

    Returns:
        The folder, which holds the checkpoints of an interrupted run if there was one.
    """
    digest = digest_of(key)
    folder = hub_home() / "runs" / f"{name}-{digest[7:19]}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", key)
    shutil.rmtree(folder / "expert", ignore_errors=True)
    return folder


def write_description(folder: Path, expert: Expert, identity: Identity) -> None:
    """Write expert.json: see `description`."""
    write_text(folder / DESCRIPTION, description(expert, identity))


def description(expert: Expert, identity: Identity) -> str:
    """The content of expert.json: what the registry says of the expert, and its identity."""
    record = expert.model_dump(mode="json", exclude={"sources", "digest"})
    return format_json({**record, "identity": identity.record()})


def add_folder(
    folder: Path,
    name: str,
    session: Session,
    *,
    version: int | None = None,
    base: str | None = None,
    task: str | None = None,
    description: str | None = None,
    source: str | None = None,
    file: Path | None = None,
    hashed: Mapping[str, str] = MappingProxyType({}),
) -> Expert:
    """Copy someone's folder into the store and register it under a name.

    Args:
        folder: The folder with the expert's files.
        name: The name in the registry.
        session: The registry and the store.
        version: The version. The default is the next one of the name, or the present one if the
            content is the same.
        base: The base that it was trained on. The default is the one in its expert.json or
            adapter_config.json, which need not be here.
        task: The task that it was trained on. The default is the one in its expert.json.
        description: One line about the expert. The default is the one in its expert.json.
        source: The source of the folder. The default is the folder itself.
        file: The registry file to write. The default is the user's own registry.
        hashed: The sha256 of files whose bytes were read just now, see `Store.add`.

    Returns:
        The expert as it is registered.

    Raises:
        IntegrityError: The files or the expert.json are malformed.
        ConflictError: The name and version have other content.
    """
    registry, store = session.registry, session.store
    identity = read_folder(folder, hashed)
    digest = identity.digest
    same = [e for e in registry.experts() if e.name == name and e.digest == digest]
    if version is None and same and file is None:
        store.take(folder, identity, hashed=hashed)
        return same[-1]
    stated = stated_in(folder)
    own = stated.get("version") if stated.get("name") == name else None
    entry = {key: stated[key] for key in Expert.model_fields if key in stated}
    entry |= {
        "name": name,
        "version": version or own or next_version(name, registry.experts()),
        "kind": identity.kind,
        "base": base or stated.get("base") or _base_name(folder, identity, registry),
        "sources": [source or _source(folder, file)],
        "digest": digest,
    }
    given = {"task": task, "description": description}
    entry |= {key: value for key, value in given.items() if value is not None}
    hint = "correct the field, or remove it"
    expert = validate_record(Expert, entry, folder / DESCRIPTION, hint)
    for known in registry.experts():
        if known.reference == expert.reference:
            check_same_content(known, expert)
    check_writable(expert)
    store.take(folder, identity, hashed=hashed)
    register(expert, file)
    return expert


def register_found(content: Content, name: str, session: Session) -> Expert:
    """Register the coefficients or the router's state that a method found.

    Args:
        content: The content in the store.
        name: The name in the user's own registry.
        session: The registry and the store.

    Returns:
        The entry as it is registered.

    Raises:
        ConflictError: The name and version have other content.
    """
    source = content.sources[0]
    with opened(source, Path.cwd()) as (folder, hashed):
        return add_folder(folder, name, session, source=source, hashed=hashed)


def _source(folder: Path, file: Path | None) -> str:
    """The folder as a source in a registry file; the user's own registry is no place near it."""
    whole = f"file:{folder.resolve()}"
    return relative_source(whole, file.resolve().parent) if file else whole


def _base_name(folder: Path, identity: Identity, registry: Registry) -> str:
    """Return the base that a folder's files name, under the registry's name if it has one."""
    named = kinds[identity.kind].base_name(folder)
    if not named:
        return "unknown"
    try:
        return registry.base(named)[0]
    except NotFoundError:
        return named
