"""Describing experts: `expert.json` in a folder, and the registry entry."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.errors import ConflictError, IntegrityError
from experthub.hub.files.atomic import hub_home, write_json, write_text
from experthub.hub.files.digests import digest_of, format_json
from experthub.hub.formats.records import validate_record
from experthub.hub.kinds import kinds
from experthub.hub.registry.content import Content
from experthub.hub.registry.entries import (
    MAX_VERSION,
    check_conflict,
    check_version,
    check_writable,
    find_next_version,
    register,
)
from experthub.hub.registry.expert import DESCRIPTION, Expert, Identity, make_source_relative
from experthub.hub.registry.proof_record import Proof
from experthub.hub.session import Session
from experthub.hub.store.folder import read_description, read_folder
from experthub.hub.transfer.sources import open_source

# A proof is made where an expert is added; that of somebody else proves nothing here.
DESCRIBED = Expert.model_fields.keys() - {"proof"}


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
    """Write the `expert.json` of a newly trained expert, store the expert, and register it.

    The expert becomes the next version of the name, unless a version has the same content.

    Args:
        folder: The folder with the trained files.
        name: The name in the registry.
        base: The base that was trained.
        session: The registry and the store.
        task: The task that the expert was trained on, or None.
        training: The settings and results of the training, for `expert.json`.
        like: The expert that the training started from. Its licence, description and tags are kept.
        version: The version to register. The default is the next version of the name.
        description: One line about the expert, if `like` is not given.

    Returns:
        The expert as it is registered.

    Raises:
        ConflictError: The name and version are registered with other content.
    """
    experts = session.registry.list_experts()
    bare = read_folder(folder)
    identity = bare.model_copy(update={"base_fingerprint": base.fingerprint})
    kept: dict[str, Any] = {"description": description}
    if like is not None:
        kept = like.model_dump(include={"license", "description", "tags"})
    expert = Expert(
        name=name,
        version=check_version(name, version) if version else find_next_version(name, experts),
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
    same = [e for e in experts if (e.name, e.digest) == (name, identity.digest)]
    if version is None and same:
        return same[-1]
    check_conflict(expert, experts)
    register(expert)
    session.refresh()
    return expert


def create_checkpoint_folder(name: str, key: dict[str, Any]) -> Path:
    """Create the folder for the checkpoints of one training run.

    Args:
        name: The name of the expert that is trained.
        key: The settings, the data and the weights of the run. Each key has its own folder.

    Returns:
        The folder. It holds the checkpoints of an interrupted run with the same key.
    """
    digest = digest_of(key)
    folder = hub_home() / "runs" / f"{name}-{digest[7:19]}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", key)
    shutil.rmtree(folder / "expert", ignore_errors=True)
    return folder


def write_description(folder: Path, expert: Expert, identity: Identity) -> None:
    """Write the `expert.json` of a folder.

    Args:
        folder: The expert's folder.
        expert: The registry entry.
        identity: The identity of the content.
    """
    write_text(folder / DESCRIPTION, format_description(expert, identity))


def format_description(expert: Expert, identity: Identity) -> str:
    """Format the content of an `expert.json`: the registry entry and the identity.

    Args:
        expert: The registry entry.
        identity: The identity of the content.

    Returns:
        The JSON text, without the sources of the entry.
    """
    record = expert.model_dump(mode="json", exclude={"sources", "digest", "proof"})
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
    stated: str | None = None,
    made_from: Mapping[str, Any] = MappingProxyType({}),
    check: Callable[[Expert], None] = lambda expert: None,
    prove: Callable[[Expert], Proof | None] = lambda expert: None,
) -> Expert:
    """Copy a folder that somebody wrote into the store, and register it under a name.

    Args:
        folder: The folder with the expert's files.
        name: The name in the registry.
        session: The registry and the store.
        version: The version. The default is the next version of the name, or the version that has
            the same content.
        base: The name of the base that the expert was trained on; it need not be registered. The
            default is the name in `expert.json` or `adapter_config.json`.
        task: The task that the expert was trained on. The default is the one in `expert.json`.
        description: One line about the expert. The default is the one in `expert.json`.
        source: The source of the folder. The default is the folder itself.
        file: The registry file to write to. The default is the user's own registry.
        hashed: The sha256 of files by name, as for `Store.add`.
        stated: The digest that the source states, if it states one.
        made_from: The record of the conversion that made the folder, if one did.
        check: A function that raises an error if the entry must not be registered.
        prove: A function that compares the stored expert with its own library. If it raises an
            error, the expert is not registered.

    Returns:
        The expert as it is registered.

    Raises:
        IntegrityError: The files or `expert.json` are malformed, have another digest than stated,
            or state a version that is too large.
        ConflictError: The name and version are registered with other content, or the name has this
            content with another base, task or description.
    """
    fields = {"base": base, "task": task, "description": description}
    given = {key: value for key, value in fields.items() if value is not None}
    with session.store.receive(folder, hashed=hashed) as (draft, own):
        identity = read_folder(draft, own)
        if stated and identity.digest != stated:
            raise IntegrityError(
                f"{source or folder} is stated to be {stated[:19]}, and its files are "
                f"{identity.digest[:19]}",
                "ask whoever shared it to push it again",
            )
        same = _find_same(name, identity.digest, given, session) if not (version or file) else None
        if same is None:
            entry = _make_entry(draft, name, identity, session, version, given)
            entry["sources"] = [source or _make_source(folder, file)]
            entry |= {"made_from": dict(made_from)} if made_from else {}
            hint = "correct the field, or remove it"
            expert = validate_record(Expert, entry, draft / DESCRIPTION, hint)
            check(expert)
            check_conflict(expert, session.registry.list_experts())
            check_writable(expert)
        session.store.take(draft, identity, hashed=own)
    expert = same or expert
    if expert.proof is None and (proof := prove(expert)) is not None:
        expert = expert.model_copy(update={"proof": proof})
    if expert is not same:
        register(expert, file)
        session.refresh()
    return expert


def _find_same(name: str, digest: str, given: Mapping[str, str], session: Session) -> Expert | None:
    """Return the entry that has this name and content; refuse fields that it has otherwise."""
    experts = session.registry.list_experts()
    same = [e for e in experts if (e.name, e.digest) == (name, digest)]
    for key, value in given.items() if same else ():
        if (there := getattr(same[-1], key)) != value:
            raise ConflictError(
                f"{same[-1].reference} has this content, with the {key} {there or '(none)'}",
                f"run hub rm {same[-1].reference} before, or add it under another name",
            )
    return same[-1] if same else None


def _make_entry(
    folder: Path,
    name: str,
    identity: Identity,
    session: Session,
    version: int | None,
    given: dict[str, str],
) -> dict[str, Any]:
    """Make the fields of an entry, except its sources, from a folder's `expert.json` and `given`."""
    stated = read_description(folder)
    own = stated.get("version") if stated.get("name") == name else None
    if version is None and isinstance(own, int) and own > MAX_VERSION:
        raise IntegrityError(
            f"{folder / DESCRIPTION}: the version {own} is above {MAX_VERSION}",
            "correct the version, or choose another name with --name",
        )
    entry: dict[str, Any] = {key: stated[key] for key in DESCRIBED if key in stated}
    entry |= {
        "name": name,
        "version": check_version(name, version)
        if version
        else own or find_next_version(name, session.registry.list_experts()),
        "kind": identity.kind,
        "base": given.get("base")
        or stated.get("base")
        or _find_base_name(folder, identity, session),
        "digest": identity.digest,
    }
    return entry | given


def register_state(content: Content, name: str, session: Session) -> Expert:
    """Register a stored state: learned coefficients or the state of a router.

    Args:
        content: The content in the store.
        name: The name in the user's own registry.
        session: The registry and the store.

    Returns:
        The entry as it is registered.

    Raises:
        ConflictError: The name and version are registered with other content.
    """
    source = content.sources[0]
    with open_source(source, Path.cwd()) as found:
        return add_folder(found.folder, name, session, source=source, hashed=found.hashed)


def _make_source(folder: Path, file: Path | None) -> str:
    """Return a folder as a source; relative if a registry file beside it will hold the source."""
    whole = f"file:{folder.resolve()}"
    return make_source_relative(whole, file.resolve().parent) if file else whole


def _find_base_name(folder: Path, identity: Identity, session: Session) -> str:
    """Return the base that a folder's files name, under its name in the registry if it has one.

    An adapter that was trained on a quantised copy of a base gets the base itself, with a note.
    """
    named = kinds[identity.kind].base_name(folder)
    if not named:
        return "unknown"
    registry = session.registry
    if registry.has_base(named):
        return registry.find_base(named)[0]
    known, original = registry.find_base_of_folder(named), registry.find_original_base(named)
    if known is None and original is not None:
        session.report(f"note: {named} is taken for a quantised copy of {original}", 0, 0)
    return known or original or named
