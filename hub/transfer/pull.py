"""Bringing experts into the store, from wherever their sources are."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from experthub.hub.errors import HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.oci_layout import Layout, is_layout
from experthub.hub.progress import Report, silent
from experthub.hub.registry.expert import (
    DESCRIPTION,
    NAME,
    Expert,
    Identity,
    Reference,
    absolute_source,
)
from experthub.hub.registry.registry import Registry, checked_name, register, with_source
from experthub.hub.store.store import Store
from experthub.hub.transfer.sources import opened


@dataclass(frozen=True)
class Content:
    """An expert's content: what it is called, what it is, where to get it, and for which task."""

    reference: str
    digest: str
    sources: tuple[str, ...]
    task: str | None

    @classmethod
    def of(cls, expert: Expert) -> Content:
        return cls(expert.reference, expert.digest, tuple(expert.sources), expert.task)


def pull(store: Store, *contents: Content, report: Report = silent) -> list[Identity]:
    """Bring contents into the store unless they are there whole; they stay while this process runs.

    The sources of each are tried in order; the first error is raised when all of them fail.
    """
    store.hold(*(content.digest for content in contents))  # from now on they are not collected
    found = []
    for content in contents:
        try:
            found.append(store.identity(content.digest))
        except NotFoundError:
            fetch(content, store, report)
            found.append(store.identity(content.digest))
    return found


def fetch(
    content: Content, store: Store, report: Report = silent, renew: Set[str] = frozenset()
) -> None:
    """As `pull`, whatever is there.  renew: sha256 of damaged objects, which are replaced."""
    problems: list[HubError] = []
    for source in content.sources:
        try:
            report(f"pulling {content.reference} from {source}", 0, 0)
            with opened(source, Path.cwd(), report) as (folder, hashed):
                store.add(folder, content.digest, renew, hashed)
            return
        except HubError as error:
            problems.append(error)
    first = problems[0]
    first.message = f"cannot pull {content.reference}: {first.message}"
    raise first


def pull_by_name(
    name: str,
    registry: Registry,
    store: Store,
    report: Report = silent,
    *,
    as_name: str | None = None,
) -> list[Expert]:
    """Pull what a reference means, and enter it into the user's own registry.

    name: one that a registry knows, `hf:org/name[@revision]`, which is pinned to its commit, or a
    folder, shared folder or archive (`file:PLACE[#name@version]`), of which all experts are taken.
    as_name: what to call one that no registry knows; by default what its expert.json says, or the
    last part of its source.
    """
    reference = Reference.parse(name)
    if not reference.name:
        sources = _members(reference) or [absolute_source(name, Path.cwd())]
        if as_name and len(sources) > 1:
            raise UsageError(f"{name} holds {len(sources)} experts", "--name is for one")
        return [_take_in(source, registry, store, report, as_name) for source in sources]
    if as_name:
        raise UsageError(f"{name} has a name already", "--name is for what no registry knows")
    expert = registry.expert(reference)
    pull(store, Content.of(expert), report=report)
    register(expert)
    return [expert]


def _members(reference: Reference) -> list[str]:
    """The sources of the experts that a shared folder or archive holds."""
    place = reference.folder
    if place is None or reference.member or not is_layout(place):
        return []
    found = [f"file:{place.resolve()}#{member}" for member in Layout.read(place).experts]
    if not found:
        raise NotFoundError(f"{place} holds no experts", "hub push writes into shared folders")
    return found


def _take_in(
    source: str, registry: Registry, store: Store, report: Report, as_name: str | None
) -> Expert:
    """Store and register what no registry knows."""
    from experthub.hub.transfer.describe import add_folder

    with opened(source, Path.cwd(), report) as (folder, hashed):
        stated = read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else {}
        named = str(stated.get("name") or "")
        if named and not as_name and not re.fullmatch(NAME, named):
            raise IntegrityError(
                f"{source} calls itself {named[:80]!r}, which is not a name",
                "choose one with --name",
            )
        place = source.partition("@")[0].rpartition("/")[2]
        own = re.sub(r"[^a-z0-9._-]+", "-", place.lower())
        if source.startswith("hf:"):
            source = f"{source.partition('@')[0]}@{folder.name[:40]}"  # the commit that it is now
        name = checked_name(as_name or named or own)
        expert = add_folder(folder, name, registry, store, source=source, hashed=hashed)
    return with_source(expert, source)
