"""Pulling what a user names: a registry's entry, a repository, or a shared folder of experts."""

from __future__ import annotations

import re
from pathlib import Path

from experthub.hub.errors import IntegrityError, NotFoundError, UsageError
from experthub.hub.formats.oci_layout import OciLayout, is_layout
from experthub.hub.registry.content import Content
from experthub.hub.registry.entries import add_source, check_name, register
from experthub.hub.registry.expert import NAME, Expert, Reference, absolute_source
from experthub.hub.session import Session
from experthub.hub.store.folder import stated_in
from experthub.hub.transfer.describe import add_folder
from experthub.hub.transfer.pull import pull
from experthub.hub.transfer.sources import opened


def pull_by_name(name: str, session: Session, *, as_name: str | None = None) -> list[Expert]:
    """Pull what a reference means, and enter it into the user's own registry.

    Args:
        name: A name that a registry knows, or `hf:org/name[@revision]`, which is pinned to its
            commit, or a folder, shared folder or archive (`file:PLACE[#name@version]`). Without
            `#name@version`, all experts of a shared folder or archive are pulled.
        session: The registry, the store and the progress callback.
        as_name: The name of an expert that no registry knows. The default is the name in its
            expert.json, or else the last part of its source.

    Returns:
        The experts as they are registered.

    Raises:
        NotFoundError: The name is unknown, or the place holds no experts.
        UsageError: `as_name` is given for a known name, or for several experts.
        IntegrityError: The content is damaged, or its expert.json has a malformed name.
    """
    reference = Reference.parse(name)
    if not reference.name:
        sources = _members(reference) or [absolute_source(name, Path.cwd())]
        if as_name and len(sources) > 1:
            raise UsageError(f"{name} holds {len(sources)} experts", "--name is for one")
        return [_take_in(source, session, as_name) for source in sources]
    if as_name:
        raise UsageError(f"{name} has a name already", "--name is for what no registry knows")
    expert = session.registry.expert(reference)
    pull(session, Content.of(expert))
    register(expert)
    return [expert]


def _members(reference: Reference) -> list[str]:
    """List the sources of the experts that a shared folder or archive holds."""
    place = reference.folder
    if place is None or reference.member or not is_layout(place):
        return []
    found = [f"file:{place.resolve()}#{member}" for member in OciLayout.read(place).experts]
    if not found:
        raise NotFoundError(f"{place} holds no experts", "hub push writes into shared folders")
    return found


def _take_in(source: str, session: Session, as_name: str | None) -> Expert:
    """Store and register an expert that no registry knows."""
    with opened(source, Path.cwd(), session.report) as (folder, hashed):
        named = str(stated_in(folder).get("name") or "")
        if named and not as_name and not re.fullmatch(NAME, named):
            raise IntegrityError(
                f"{source} calls itself {named[:80]!r}, which is not a name",
                "choose one with --name",
            )
        place = source.partition("@")[0].rpartition("/")[2]
        own = re.sub(r"[^a-z0-9._-]+", "-", place.lower())
        if source.startswith("hf:"):
            source = f"{source.partition('@')[0]}@{folder.name[:40]}"  # the commit that it is now
        name = check_name(as_name or named or own)
        expert = add_folder(folder, name, session, source=source, hashed=hashed)
    return add_source(expert, source)
