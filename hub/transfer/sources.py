"""Sources: make the files that a source refers to available as a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experthub.hub.errors import HubError
from experthub.hub.files.atomic import hub_home, open_draft_folder
from experthub.hub.formats.oci_layout import EXPERT_DIGEST, OciLayout, is_layout
from experthub.hub.kinds.kind import PICKLES
from experthub.hub.progress import Report, silent
from experthub.hub.registry.expert import Reference
from experthub.hub.registry.file_patterns import list_fetched_files
from experthub.hub.transfer.remotes import hf

# A file with one of these endings holds weights, and is not an archive.
WEIGHT_FILES = (".safetensors", ".gguf", *PICKLES)


@dataclass(frozen=True)
class OpenedSource:
    """The files of a source.

    Args:
        folder: The folder that has them, or the one file of an adapter of another program.
        hashed: The sha256 of the files by name, which were computed just now, if the folder belongs
            to the hub; otherwise empty.
        stated: The digest of the expert that the source states, or None.
    """

    folder: Path
    hashed: Mapping[str, str]
    stated: str | None = None


def fetch_source(
    source: str, near: Path, patterns: tuple[str, ...], report: Report = silent
) -> Path:
    """Make the files of a source available as a folder.

    Args:
        source: A folder, or `hf:org/name[@revision]`.
        near: The folder that a relative source starts from.
        patterns: Shell patterns of the wanted files of a repository.
        report: A progress callback.

    Returns:
        The folder itself, or the folder into which the repository was fetched.

    Raises:
        HubError: The source has another form, or cannot be fetched.
    """
    return _fetch(source, near, patterns, report)[0]


def _fetch(
    source: str, near: Path, patterns: tuple[str, ...], report: Report
) -> tuple[Path, dict[str, str]]:
    """Fetch a source; return its folder, and the sha256 of files that were downloaded now."""
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
    raise HubError(f"cannot fetch {source}", "use a folder, file:PLACE or hf:org/name")


@contextmanager
def open_source(source: str, near: Path, report: Report = silent) -> Iterator[OpenedSource]:
    """Make an expert's files available as a folder during the block.

    Args:
        source: A folder, a file of weights, `hf:org/name[@revision]`, or one expert of a shared folder or archive,
            `file:PLACE#name@version`. The part after `#` may be omitted if there is one expert.
        near: The folder that a relative source starts from.
        report: A progress callback.

    Yields:
        The files.

    Raises:
        HubError: The source cannot be fetched.
        NotFoundError: There is no such expert in the shared folder or archive.
        IntegrityError: The shared folder or archive is damaged.
    """
    place, hashed = _fetch(source, near, list_fetched_files(), report)
    if source.startswith("hf:") and not hashed:
        hashed = hf.verify_fetched(place)
    if not is_layout(place) or place.suffix in WEIGHT_FILES:
        with _name_source_in_errors(source, place):
            yield OpenedSource(place, hashed)
        return
    with (
        open_draft_folder(hub_home() / "drafts" / "unpacked") as folder,
        _name_source_in_errors(source, folder),
    ):
        layout = OciLayout.read(place)
        member = layout.find(Reference.parse(source, near).member)
        hashed = layout.unpack(member, folder)
        yield OpenedSource(folder, hashed, layout.experts[member].annotations[EXPERT_DIGEST])


@contextmanager
def _name_source_in_errors(source: str, folder: Path) -> Iterator[None]:
    """Replace the path of a folder of the hub by its source in the errors of the block."""
    try:
        yield
    except HubError as error:
        if folder.is_relative_to(hub_home()):
            error.message = error.message.replace(str(folder), source)
        raise
