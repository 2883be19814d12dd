"""The files of a repository as the Hugging Face Hub lists them. Every field is checked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.files.patterns import matches_any
from experthub.hub.formats.model_files import (
    LICENCES,
    MODULE_FOLDER,
    OTHER_VOCABULARIES,
    TEMPLATES,
)
from experthub.hub.kinds.kind import PICKLES
from experthub.hub.registry.file_patterns import list_file_patterns
from experthub.hub.transfer.remotes._download import SHA256
from experthub.hub.transfer.remotes._hf_api import read_endpoint, request_json

if TYPE_CHECKING:
    import httpx

# The patterns of earlier versions, whose folders stay valid, and the present ones. A folder is named
# after a hash of its patterns.
EARLIER_MODEL = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
PARTS = (f"{TEMPLATES}/*.jinja", "[0-9]*_*/config.json", "[0-9]*_*/model.safetensors")
MODEL = (*EARLIER_MODEL, *OTHER_VOCABULARIES, *LICENCES, *PARTS)
MAX_FOLDERS = 16  # sub-folders of a repository that are listed
USUAL = (".gitattributes", ".gitignore", "*.md", "LICENSE*")  # These are omitted without a note.
MAX_SMALL = 8 << 20  # bytes of a file that git stores itself
MAX_LARGE = 1 << 40  # bytes of a file in the large file storage
MAX_ENTRIES, MAX_PAGES = 10_000, 100
LIST_SECONDS = 600.0  # The time for all pages of a list of files.
COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,119}"
FILE_PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}"
NAME = re.compile(rf"{FILE_PART}(?:/{FILE_PART})?")


@dataclass(frozen=True)
class HfSource:
    """A parsed source `hf:org/name[@revision]`.

    Args:
        repository: The repository, `org/name`.
        revision: A branch, a tag or a commit.
    """

    repository: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> HfSource:
        """Parse a source.

        Args:
            text: The source.

        Returns:
            The repository and the revision, which is `main` by default.

        Raises:
            UsageError: The text is not such a source.
        """
        found = re.fullmatch(rf"hf:({REPOSITORY}(?:/{REPOSITORY})?)(?:@({REVISION}))?", text)
        if not found or ".." in text or "--" in found.group(1):
            raise UsageError(
                f"{text[:200]!r} is not a source", "write hf:org/name or hf:org/name@revision"
            )
        return cls(found.group(1), found.group(2) or "main")

    def api_url(self, path: str) -> str:
        """Return a URL of the Hub's API.

        Args:
            path: The path below the repository.

        Returns:
            The URL.
        """
        return f"{read_endpoint()}/api/models/{self.repository}/{path}"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Args:
        name: The name.
        size: The size in bytes.
        blob: The sha1 of the file as a git blob.
        sha256: The sha256 of a file in the large file storage; None for other files.
    """

    name: str
    size: int
    blob: str
    sha256: str | None


def find_commit(session: httpx.Client, place: HfSource, source: str) -> str:
    """Find the present commit of a revision.

    Args:
        session: The client.
        place: The repository and the revision.
        source: The source as the user wrote it, for errors.

    Returns:
        The commit, 40 hexadecimal digits.

    Raises:
        HubError: The request failed, or the answer has no commit.
    """
    url = place.api_url(f"revision/{quote(place.revision, safe='')}")
    answer, _ = request_json(session, url, source)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise HubError(f"{source}: the server's answer has no commit", "check HF_ENDPOINT")
    return commit


def _list_rows(
    session: httpx.Client, place: HfSource, commit: str, source: str, folder: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield the entries at the top of a repository, or in one of its folders, page by page."""
    url: str | None = place.api_url(f"tree/{commit}{folder}?recursive=false&expand=false")
    pages = count = 0
    end = time.monotonic() + LIST_SECONDS
    while url:
        rows, following = request_json(session, url, source)
        pages += 1
        if not isinstance(rows, list):
            raise HubError(f"{source}: the server's answer is not a list", "check HF_ENDPOINT")
        count += len(rows)
        if count > MAX_ENTRIES or pages > MAX_PAGES:
            raise HubError(
                f"{source} has more than {MAX_ENTRIES} files", "check that it is a model"
            )
        if time.monotonic() > end:
            raise HubError(
                f"{source}: the list of its files took more than {LIST_SECONDS:g} s",
                "try again later, or check HF_ENDPOINT",
            )
        yield from (row for row in rows if isinstance(row, dict))
        url = following


def list_files(
    session: httpx.Client,
    place: HfSource,
    commit: str,
    patterns: tuple[str, ...],
    source: str,
    note: Callable[[str], None] = lambda _: None,
) -> list[RemoteFile]:
    """List the files of a repository that match the patterns.

    Folders are not searched, except those of a model's chat templates and of the parts of a
    sentence encoder. Another form of a vocabulary is omitted if there is a tokenizer.json.

    Args:
        session: The client.
        place: The repository.
        commit: The commit.
        patterns: Shell patterns of the wanted files.
        source: The source as the user wrote it, for errors.
        note: Receives a message about omitted files.

    Returns:
        The files with their digests.

    Raises:
        IntegrityError: There are no safetensors, two files differ only in case, or an entry has no
            valid size and digest.
        HubError: The request failed.
    """
    files: dict[str, RemoteFile] = {}
    others = []
    rows = list(_list_rows(session, place, commit, source))
    if patterns is MODEL:
        rows += _list_parts(session, place, commit, source, rows)
    has_tokenizer = any(row.get("path") == "tokenizer.json" for row in rows)
    for row in rows:
        name = str(row.get("path"))
        wanted = NAME.fullmatch(name) and matches_any(name, PARTS if "/" in name else patterns)
        wanted = wanted and not (has_tokenizer and name in OTHER_VOCABULARIES)
        # transformers would also load an adapter beside a model.
        if (
            row.get("type") != "file"
            or not wanted
            or (patterns is MODEL and matches_any(name, list_file_patterns()))
        ):
            others.append(name)
            continue
        if name.lower() in files:
            raise IntegrityError(f"{source} has two files {name!r}", "use another revision")
        files[name.lower()] = _check_row(name, row, source)
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        pickles = [_escape_name(name) for name in others if name.endswith(PICKLES)]
        only = f": only {pickles[0]}, and pickles are never read" if pickles else ""
        raise IntegrityError(
            f"{source} has no safetensors{only}", "ask its owner to convert the weights"
        )
    others = [name for name in others if not matches_any(name, USUAL)]
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        note(f"{source}: omitted {', '.join(map(_escape_name, sorted(others)[:8]))}{more}")
    return list(files.values())


def _list_parts(
    session: httpx.Client, place: HfSource, commit: str, source: str, rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the files in the folders of chat templates and of the parts of a sentence encoder."""
    folders = [str(row.get("path")) for row in rows if row.get("type") == "directory"]
    folders = [name for name in folders if name == TEMPLATES or MODULE_FOLDER.fullmatch(name)]
    for name in folders[:MAX_FOLDERS]:
        yield from _list_rows(session, place, commit, source, f"/{quote(name)}")


def _escape_name(name: str) -> str:
    """Shorten a name from a server, and escape characters that a terminal would interpret."""
    return ascii(name[:80])[1:-1]


def _check_row(name: str, row: dict[str, Any], source: str) -> RemoteFile:
    """Check an entry of a list before its fields are used as a path or a size."""
    large = row.get("lfs")
    size = large.get("size") if isinstance(large, dict) else row.get("size")
    sha256 = str(large.get("oid", "")).removeprefix("sha256:") if isinstance(large, dict) else None
    blob = row.get("oid")
    wrong = (
        not isinstance(size, int)
        or (sha256 is not None and row.get("size", size) != size)
        or not 0 <= size <= (MAX_SMALL if sha256 is None else MAX_LARGE)
        or (sha256 is not None and not SHA256.fullmatch(sha256))
        or (sha256 is None and not (isinstance(blob, str) and COMMIT.fullmatch(blob)))
    )
    if wrong:
        raise IntegrityError(f"{source}: {name} has no valid size and digest", "check HF_ENDPOINT")
    return RemoteFile(name, int(size or 0), str(blob), sha256)
