"""Naming what is stored: expert.json in a folder, and the registry's entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experthub.hub._files import check_free, new_folder, write_json
from experthub.hub.bases import Base, Report, silent
from experthub.hub.errors import NotFoundError
from experthub.hub.expert import DESCRIPTION, Expert, Identity, Reference
from experthub.hub.formats import read_json
from experthub.hub.pull import pull
from experthub.hub.registry import Registry, next_version, register
from experthub.hub.store import Store, read_folder


def describe(
    folder: Path,
    name: str,
    version: int,
    base: Base,
    store: Store,
    *,
    task: str | None,
    training: dict[str, Any],
    like: Expert | None = None,
) -> Expert:
    """Give a freshly trained folder its identity and description, store it, and register it.

    like: the expert it goes on from, whose licence, description and tags it keeps.
    """
    bare = read_folder(folder)
    identity = bare.model_copy(update={"base_fingerprint": base.fingerprint})
    kept = {} if like is None else like.model_dump(include={"license", "description", "tags"})
    expert = Expert(
        name=name,
        version=version,
        kind=identity.kind,
        base=base.name,
        digest=identity.digest,
        sources=[f"file:{folder}"],
        task=task,
        training=training,
        **(kept or {"license": "apache-2.0"}),
    )
    write_description(folder, expert, identity)
    store.add(folder, identity.digest)
    register(expert)
    return expert


def write_description(folder: Path, expert: Expert, identity: Identity) -> None:
    """Write expert.json: what the registry says of the expert, and its identity."""
    record = expert.model_dump(mode="json", exclude={"sources", "digest"}, exclude_defaults=True)
    write_json(folder / DESCRIPTION, {**record, "identity": identity.record()})


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
    file: Path | None = None,
) -> Expert:
    """Take someone's folder into the store and register it under a name.

    version: the next one of the name by default, or the present one if the content is the same.
    base: what it was trained on; by default what its expert.json or adapter_config.json says,
    which need not be here.  file: the registry to write to, the user's own by default.
    """
    digest, identity = store.add(folder)
    same = [e for e in registry.experts() if e.name == name and e.digest == digest]
    if version is None and same and file is None:
        return same[-1]
    stated = read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else {}
    entry = {key: stated[key] for key in Expert.model_fields if key in stated}
    entry |= {
        "name": name,
        "version": version or stated.get("version") or next_version(name, registry.experts()),
        "kind": identity.kind,
        "base": base or stated.get("base") or base_of(folder, registry),
        "sources": [f"file:{_relative(folder, file)}"],
        "digest": digest,
    }
    given = {"task": task, "description": description}
    entry |= {key: value for key, value in given.items() if value is not None}
    expert = Expert.model_validate(entry)
    register(expert, file)
    return expert


def _relative(folder: Path, file: Path | None) -> Path:
    whole = folder.resolve()
    near = file.resolve().parent if file else None
    return whole.relative_to(near) if near and whole.is_relative_to(near) else whole


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


def export_folder(
    name: str, folder: Path, registry: Registry, store: Store, report: Report = silent
) -> Expert:
    """Write an expert's files and description into a new folder; ConflictError if it is in use."""
    expert = registry.expert(Reference.parse(name))
    pull(expert, store, report)
    check_free(folder)
    with new_folder(folder) as draft:
        store.copy_out(expert.digest, draft)
        write_description(draft, expert, store.identity(expert.digest))
    return expert
