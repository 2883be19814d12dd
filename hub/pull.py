"""Bringing experts into the store, from wherever their sources are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from experthub.hub._files import hub_home
from experthub.hub.bases import Report, silent
from experthub.hub.errors import HubError, NotFoundError, UsageError
from experthub.hub.expert import DESCRIPTION, Expert, Reference
from experthub.hub.formats.adapter import read_json
from experthub.hub.registry import Registry, checked_name, register
from experthub.hub.store import Store


def source_folder(source: str, near: Path, report: Report = silent) -> tuple[Path, dict[str, str]]:
    """The local folder behind a source, fetched where it is remote.

    Then also the sha256 of its files, which nobody but the hub has in hand.
    """
    reference = Reference.parse(source, near)
    if reference.folder is not None:
        return reference.folder, {}
    if source.startswith("hf:"):
        from experthub.hub.remotes import hf

        return hf.fetch_expert(
            source,
            hub_home() / "hf",
            lambda done, size: report(f"fetching {source}", done, size),
        )
    raise HubError(f"an expert cannot come from {source}", "use file:, hf:, or a folder")


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


def pull(content: Content, store: Store, report: Report = silent) -> None:
    """Bring an expert's content into the store unless it is there whole.

    Its sources are tried in order; the first error is raised when all of them fail.
    """
    try:
        store.identity(content.digest)
        return
    except NotFoundError:
        pass
    problems: list[HubError] = []
    for source in content.sources:
        try:
            report(f"pulling {content.reference} from {source}", 0, 0)
            folder, hashed = source_folder(source, Path.cwd(), report)
            store.add(folder, content.digest, hashed)
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
) -> Expert:
    """Pull an expert by reference and enter it into the user's own registry.

    name: one that a registry knows, or `hf:org/name[@revision]`, which is pinned to its commit.
    as_name: what to call one from a model hub; by default what its expert.json or its repository says.
    """
    reference = Reference.parse(name)
    if reference.remote:
        return _pull_remote(name, registry, store, report, as_name)
    if as_name:
        raise UsageError(f"{name} has a name already", "--name is for what comes from a model hub")
    expert = registry.expert(reference)
    pull(Content.of(expert), store, report)
    register(expert)
    return expert


def _pull_remote(
    source: str, registry: Registry, store: Store, report: Report, as_name: str | None
) -> Expert:
    from experthub.hub.describe import add_folder
    from experthub.hub.remotes.hf import HfSource

    folder, hashed = source_folder(source, Path.cwd(), report)
    place = HfSource.parse(source)
    stated = read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else {}
    own = re.sub(r"[^a-z0-9._-]+", "-", place.repository.rpartition("/")[2].lower())
    pinned = f"hf:{place.repository}@{folder.name[:40]}"
    name = as_name or str(stated.get("name") or own)
    return add_folder(folder, checked_name(name), registry, store, source=pinned, hashed=hashed)
