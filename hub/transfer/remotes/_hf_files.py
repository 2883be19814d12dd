"""What a repository of a model hub holds, as the hub says, and every word of it checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.files.patterns import is_named
from experthub.hub.registry.expert import expert_files
from experthub.hub.transfer.remotes._hf_api import ask, endpoint
from experthub.hub.transfer.remotes._http import SHA256

if TYPE_CHECKING:
    import httpx

MODEL = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
USUAL = (".gitattributes", ".gitignore", "*.md", "LICENSE*")  # left out without a word
SMALL = 8 << 20  # bytes of a file that is no large file of the repository
LARGEST = 1 << 40
ENTRIES, PAGES = 10_000, 100
COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,119}"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


@dataclass(frozen=True)
class HfSource:
    """`hf:org/name[@revision]`; the revision is a branch, a tag or a commit, `main` by default."""

    repository: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> HfSource:
        found = re.fullmatch(rf"hf:({REPOSITORY}(?:/{REPOSITORY})?)(?:@({REVISION}))?", text)
        if not found or ".." in text or "--" in found.group(1):
            raise UsageError(
                f"{text[:200]!r} is no source", "write hf:org/name or hf:org/name@revision"
            )
        return cls(found.group(1), found.group(2) or "main")

    def api(self, path: str) -> str:
        return f"{endpoint()}/api/models/{self.repository}/{path}"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: sha256 is known for large ones, blob is git's sha1 of the others."""

    name: str
    size: int
    blob: str
    sha256: str | None


def commit_of(session: httpx.Client, place: HfSource, source: str) -> str:
    """The commit that a revision is now."""
    url = place.api(f"revision/{quote(place.revision, safe='')}")
    answer, _ = ask(session, url, source)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise HubError(f"{source}: the server names no commit", "check HF_ENDPOINT")
    return commit


def _rows(
    session: httpx.Client, place: HfSource, commit: str, source: str
) -> Iterator[dict[str, Any]]:
    """What is at the top of a repository, as the Hub lists it, page by page."""
    url: str | None = place.api(f"tree/{commit}?recursive=false&expand=false")
    pages = count = 0
    while url:
        rows, following = ask(session, url, source)
        pages += 1
        if not isinstance(rows, list):
            raise HubError(f"{source}: its list of files is none", "check HF_ENDPOINT")
        count += len(rows)
        if count > ENTRIES or pages > PAGES:
            raise HubError(f"{source}: a list of more than {ENTRIES} files", "is it a model?")
        yield from (row for row in rows if isinstance(row, dict))
        url = following


def files_of(
    session: httpx.Client,
    place: HfSource,
    commit: str,
    patterns: tuple[str, ...],
    source: str,
    note: Callable[[str], None] = lambda _: None,
) -> list[RemoteFile]:
    """The files at the top of a repository whose names are asked for, with their digests."""
    files: dict[str, RemoteFile] = {}
    others = []
    for row in _rows(session, place, commit, source):
        name = str(row.get("path"))
        wanted = NAME.fullmatch(name) and is_named(name, patterns)
        # An adapter beside a model: transformers would load it too.
        if (
            row.get("type") != "file"
            or not wanted
            or (patterns is MODEL and is_named(name, expert_files()))
        ):
            others.append(name)
            continue
        if name.lower() in files:
            raise IntegrityError(f"{source} has two files {name!r}", "use another revision")
        files[name.lower()] = _remote_file(name, row, source)
    if not any(name.endswith(".safetensors") for name in files):
        pickles = [_printable(name) for name in others if name.endswith(PICKLES)]
        only = f": only {pickles[0]}, and pickles are never read" if pickles else ""
        raise IntegrityError(f"{source} has no safetensors{only}", "ask its owner to convert it")
    others = [name for name in others if not is_named(name, USUAL)]
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        note(f"{source}: left out {', '.join(map(_printable, sorted(others)[:8]))}{more}")
    return list(files.values())


def _printable(name: str) -> str:
    """A name that a server states, for a message: short, and without what moves a cursor."""
    return ascii(name[:80])[1:-1]


def _remote_file(name: str, row: dict[str, Any], source: str) -> RemoteFile:
    """A row of the tree, checked: nothing that a server says becomes a path or a size unchecked."""
    large = row.get("lfs")
    size = large.get("size") if isinstance(large, dict) else row.get("size")
    sha256 = str(large.get("oid", "")).removeprefix("sha256:") if isinstance(large, dict) else None
    blob = row.get("oid")
    wrong = (
        not isinstance(size, int)
        or not 0 <= size <= (SMALL if sha256 is None else LARGEST)
        or (sha256 is not None and not SHA256.fullmatch(sha256))
        or (sha256 is None and not (isinstance(blob, str) and COMMIT.fullmatch(blob)))
    )
    if wrong:
        raise IntegrityError(f"{source}: {name} has no usable size and digest", "check HF_ENDPOINT")
    return RemoteFile(name, int(size or 0), str(blob), sha256)
