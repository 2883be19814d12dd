"""Bringing experts into the store, from wherever their sources are."""

from __future__ import annotations

from pathlib import Path

from experthub.hub._files import hub_home
from experthub.hub.bases import Report, silent
from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.expert import Expert, Reference
from experthub.hub.registry import Registry, register
from experthub.hub.store import Store


def source_folder(source: str, near: Path, report: Report = silent) -> Path:
    """The local folder behind a source, fetched where it is remote."""
    reference = Reference.parse(source, near)
    if reference.folder is not None:
        return reference.folder
    if source.startswith("hf:"):
        from experthub.hub.remotes import hf

        report(f"fetching {source}", 0, 0)
        return hf.fetch(source, hub_home() / "hf")
    raise HubError(f"an expert cannot come from {source}", "use file:, hf:, or a folder")


def pull(expert: Expert, store: Store, report: Report = silent) -> str:
    """Bring an expert's content into the store unless it is there whole; returns its digest.

    Its sources are tried in order; the first error is raised when all of them fail.
    """
    try:
        store.identity(expert.digest)
        return expert.digest
    except NotFoundError:
        pass
    problems: list[HubError] = []
    for source in expert.sources:
        try:
            report(f"pulling {expert.reference} from {source}", 0, 0)
            return store.add(source_folder(source, Path.cwd(), report), expert.digest)[0]
        except HubError as error:
            problems.append(error)
    first = problems[0]
    first.message = f"cannot pull {expert.reference}: {first.message}"
    raise first


def pull_by_name(name: str, registry: Registry, store: Store, report: Report = silent) -> Expert:
    """Pull an expert by reference and enter it into the user's own registry."""
    expert = registry.expert(Reference.parse(name))
    pull(expert, store, report)
    register(expert)
    return expert
