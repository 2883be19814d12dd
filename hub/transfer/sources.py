"""Where content comes from: a source's files, as a folder on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from experthub.hub.errors import HubError
from experthub.hub.files.atomic import hub_home, open_draft_folder
from experthub.hub.formats.oci_layout import OciLayout, is_layout
from experthub.hub.progress import Report, silent
from experthub.hub.registry.expert import Reference, expert_files
from experthub.hub.transfer.remotes import hf


def fetched(source: str, near: Path, patterns: tuple[str, ...], report: Report = silent) -> Path:
    """The folder behind a source: itself, or where a repository of a model hub was fetched to.

    near: what relative paths are relative to.  patterns: the files wanted of a repository.
    """
    return _fetched(source, near, patterns, report)[0]


def _fetched(
    source: str, near: Path, patterns: tuple[str, ...], report: Report
) -> tuple[Path, dict[str, str]]:
    """As `fetched`; what was not here before comes with the sha256 of its files."""
    reference = Reference.parse(source, near)
    if reference.folder is not None:
        return reference.folder, {}
    if source.startswith("hf:"):
        return hf.fetch(
            source,
            hub_home() / "hf",
            patterns,
            lambda done, size: report(f"fetching {source}", done, size),
            lambda text: report(f"note: {text}", 0, 0),
        )
    raise HubError(f"nothing can be fetched from {source}", "use file:, hf:, or a folder")


@contextmanager
def opened(
    source: str, near: Path, report: Report = silent
) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """An expert's folder, for as long as the block lasts.

    If the folder is the hub's own, also the sha256 of its files, all of whose bytes were read now.

    source: a folder, `hf:...`, or `file:PLACE#name@version`, one of several in a shared folder or
    archive; the part behind # may be left out where there is only one.
    """
    place, hashed = _fetched(source, near, expert_files(), report)
    if source.startswith("hf:") and not hashed:
        hashed = hf.checked(place)
    if not is_layout(place):
        with _named(source, place):
            yield place, hashed
        return
    with open_draft_folder(hub_home() / "drafts" / "unpacked") as folder, _named(source, folder):
        layout = OciLayout.read(place)
        member = layout.find(Reference.parse(source, near).member)
        yield folder, layout.unpack(member, folder)


@contextmanager
def _named(source: str, folder: Path) -> Iterator[None]:
    """Errors about a folder of the hub's own name where it came from, which says more."""
    try:
        yield
    except HubError as error:
        if folder.is_relative_to(hub_home()):
            error.message = error.message.replace(str(folder), source)
        raise
