"""Naming what is stored: expert.json in a folder, and the registry's entry."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.errors import IntegrityError, NotFoundError
from experthub.hub.files.atomic import digest_of, hub_home, json_text, write_json, write_text
from experthub.hub.files.json_files import read_json
from experthub.hub.registry.expert import DESCRIPTION, Expert, Identity, relative_source
from experthub.hub.registry.registry import (
    Registry,
    check_same_content,
    check_writable,
    next_version,
    register,
)
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import Store
from experthub.hub.transfer.pull import Content
from experthub.hub.transfer.sources import opened
from pydantic import ValidationError


def describe(
    folder: Path,
    name: str,
    base: Base,
    registry: Registry,
    store: Store,
    *,
    task: str | None,
    training: dict[str, Any],
    like: Expert | None = None,
    version: int | None = None,
    description: str = "",
) -> Expert:
    """Give a freshly trained folder its identity and description, store it, and register it.

    It becomes the next version of the name, unless a version has this very content.

    like: the expert it goes on from, whose licence, description and tags it keeps.  version: the
    one that it is to be; ConflictError where that is other content.
    """
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
    store.add(folder, identity.digest)
    known = [e for e in registry.experts() if (e.name, e.digest) == (name, identity.digest)]
    if version is None and known:
        return known[-1]
    for other in registry.experts():
        if other.reference == expert.reference:
            check_same_content(other, expert)
    register(expert)
    return expert


def run_folder(name: str, key: dict[str, Any]) -> Path:
    """A folder for checkpoints that belongs to exactly these settings, data and weights."""
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
    return json_text({**record, "identity": identity.record()})


def add_folder(
    folder: Path,
    name: str,
    registry: Registry,
    store: Store,
    *,
    version: int | None = None,
    base: str | None = None,
    task: str | None = None,
    description: str | None = None,
    source: str | None = None,
    file: Path | None = None,
    hashed: Mapping[str, str] = MappingProxyType({}),
) -> Expert:
    """Take someone's folder into the store and register it under a name.

    version: the next one of the name by default, or the present one if the content is the same.
    base: what it was trained on; by default what its expert.json or adapter_config.json says,
    which need not be here.  source: where the folder came from, itself by default.  file: the
    registry to write to, the user's own by default.  hashed: see Store.add.
    """
    identity = read_folder(folder, hashed)
    digest = identity.digest
    same = [e for e in registry.experts() if e.name == name and e.digest == digest]
    if version is None and same and file is None:
        store.take(folder, identity, hashed=hashed)
        return same[-1]
    stated = read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else {}
    own = stated.get("version") if stated.get("name") == name else None
    entry = {key: stated[key] for key in Expert.model_fields if key in stated}
    entry |= {
        "name": name,
        "version": version or own or next_version(name, registry.experts()),
        "kind": identity.kind,
        "base": base or stated.get("base") or base_of(folder, registry),
        "sources": [source or _source(folder, file)],
        "digest": digest,
    }
    given = {"task": task, "description": description}
    entry |= {key: value for key, value in given.items() if value is not None}
    try:
        expert = Expert.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(
            f"{folder / DESCRIPTION}: {where}: {first['msg']}", "correct the field, or remove it"
        ) from None
    for known in registry.experts():
        if known.reference == expert.reference:
            check_same_content(known, expert)
    check_writable(expert)
    store.take(folder, identity, hashed=hashed)
    register(expert, file)
    return expert


def register_found(content: Content, name: str, registry: Registry, store: Store) -> Expert:
    """Give what a method found, coefficients or a router's state, a name in the user's registry."""
    source = content.sources[0]
    with opened(source, Path.cwd()) as (folder, hashed):
        return add_folder(folder, name, registry, store, source=source, hashed=hashed)


def _source(folder: Path, file: Path | None) -> str:
    """The folder as a source in a registry file; the user's own registry is no place near it."""
    whole = f"file:{folder.resolve()}"
    return relative_source(whole, file.resolve().parent) if file else whole


def base_of(folder: Path, registry: Registry) -> str:
    """The base that an adapter's configuration names, by the registry's name for it if it has one."""
    config = folder / "adapter_config.json"
    named = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    if not named:
        return "unknown"
    try:
        return registry.base(str(named))[0]
    except NotFoundError:
        return str(named)
