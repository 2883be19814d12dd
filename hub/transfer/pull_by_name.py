"""Pulling by name: a registry entry, a repository, or a shared folder of experts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from experthub.hub.conversion.opening import open_native
from experthub.hub.errors import IntegrityError, NotFoundError, UsageError
from experthub.hub.formats.oci_layout import OciLayout, is_layout
from experthub.hub.registry.content import Content
from experthub.hub.registry.entries import add_source, check_name, check_origin, register
from experthub.hub.registry.expert import (
    NAME,
    Expert,
    Reference,
    find_origin,
    make_source_absolute,
)
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.store.folder import read_description
from experthub.hub.transfer.describe import add_folder
from experthub.hub.transfer.pull import pull
from experthub.hub.transfer.sources import open_source


def pull_by_name(
    name: str,
    session: Session,
    *,
    as_name: str | None = None,
    accept: Callable[[str], bool] = lambda reference: False,
) -> list[Expert]:
    """Pull the experts that a reference refers to, and register them in the user's own registry.

    Args:
        name: One of:

            - the name of a registered expert;
            - `hf:org/name[@revision]`, which is pinned to its present commit;
            - a folder, shared folder or archive, `file:PLACE[#name@version]`. Without
              `#name@version`, all experts of a shared folder or archive are pulled.
        session: The registry, the store and the progress callback.
        as_name: The name of an expert that is not registered. The default is the name in its
            `expert.json`, or else the last part of its source.
        accept: A function that tells whether an expert may take over a known name from an expert
            of another origin. Its argument is the reference that the expert would get.

    Returns:
        The experts as they are registered.

    Raises:
        NotFoundError: The name is unknown, or the place holds no experts.
        UsageError: `as_name` is given for a registered expert, or for several experts.
        IntegrityError: The content is damaged, or its `expert.json` has a malformed name.
        NameConflictError: The name belongs to an expert of another origin.
    """
    reference = Reference.parse(name)
    if not reference.name:
        sources = _list_members(reference) or [make_source_absolute(name, Path.cwd())]
        if as_name and len(sources) > 1:
            raise UsageError(
                f"{name} holds {len(sources)} experts, and --name names only one",
                f"name one expert: file:{reference.folder}#name@version",
            )
        return [_pull_unregistered(source, session, as_name, accept) for source in sources]
    expert = session.registry.find_expert(reference)
    if as_name:
        raise UsageError(f"{name} is registered, and --name is for other experts", "remove --name")
    if not accept(expert.reference):
        check_origin(expert, _list_others(expert, session.registry))
    pull(session, Content.from_expert(expert))
    register(expert)
    session.refresh()
    return [expert]


def _list_others(expert: Expert, registry: Registry) -> list[Expert]:
    """List the entries of the layers that do not have an entry; none if it is the user's own."""
    if expert in registry.user.content.experts:
        return []
    others = (layer.content.experts for layer in registry.layers)
    return [other for experts in others if expert not in experts for other in experts]


def _list_members(reference: Reference) -> list[str]:
    """List the sources of the experts in a shared folder or archive."""
    place = reference.folder
    if place is None or reference.member or not is_layout(place):
        return []
    found = [f"file:{place.resolve()}#{member}" for member in OciLayout.read(place).experts]
    if not found:
        raise NotFoundError(
            f"{place} holds no experts", "push an expert to a shared folder: hub push NAME file:DIR"
        )
    return found


def _pull_unregistered(
    source: str, session: Session, as_name: str | None, accept: Callable[[str], bool]
) -> Expert:
    """Store and register an expert that is not registered."""

    def check(expert: Expert) -> None:
        if not as_name and not accept(expert.reference):
            check_origin(expert, session.registry.list_experts())

    with (
        open_source(source, Path.cwd(), session.report) as opened,
        open_native(opened, session) as native,
    ):
        found, folder = native.opened, native.opened.folder
        stated, reference = read_description(folder).get("name"), Reference.parse(source)
        place = (reference.member or reference.remote).partition("@")[0] or str(reference.folder)
        own = re.sub(r"[^a-z0-9._-]+", "-", place.rpartition("/")[2].lower())
        name = as_name or str(stated or own)
        if not as_name and not re.fullmatch(NAME, name):
            raise (IntegrityError if stated else UsageError)(
                f"{source} names the expert {name[:80]!r}, which is not a name",
                "choose a name with --name",
            )
        if source.startswith("hf:"):
            source = f"{source.partition('@')[0]}@{opened.folder.name[:40]}"  # The present commit.
        expert = add_folder(
            *(folder, check_name(name), session),
            source=source,
            hashed=found.hashed,
            stated=found.stated,
            made_from=native.made_from,
            base=native.base,
            check=check,
        )
    # A stranger with a copy of a known expert does not become a place that its name came from.
    trusted = find_origin(source) in map(find_origin, expert.sources)
    if trusted or as_name or accept(expert.reference):
        expert = add_source(expert, source)
    else:
        register(expert)
    session.refresh()
    return expert
