"""Model repositories of the Hugging Face Hub, read with every byte checked.

The Hub's own client checks sizes, not digests, and begins again after a crash; so files are fetched
here, ranged and resumable, against the digests that the repository's tree states: sha256 for large
files, git's sha1 of a blob for the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial as partial_of
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from experthub.hub._files import ensure_space, locked, new_folder, sha256_of, write_text
from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.expert import EXPERT_FILES
from experthub.hub.remotes._hf_api import ask, endpoint, headers
from experthub.hub.remotes._http import (
    SHA256,
    Progress,
    check_online,
    check_size,
    client,
    download,
    fetch_small,
    is_offline,
    quiet,
    shown,
)
from experthub.hub.sealed import write_manifest

if TYPE_CHECKING:
    import httpx

MODEL = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
USUAL = (".gitattributes", ".gitignore", "*.md", "LICENSE*")  # left out without a word
SMALL = 8 << 20  # bytes of a file that is no large file of the repository
LARGEST = 1 << 40
ENTRIES, PAGES = 10_000, 100
AT_ONCE = 4
COMMIT = re.compile(r"[0-9a-f]{40}")
FOLDER = re.compile(r"[0-9a-f]{40}-[0-9a-f]{8}")  # of a commit: what was asked for of it
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
            raise UsageError(f"{text!r} is no source", "write hf:org/name or hf:org/name@revision")
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


def fetch(
    source: str,
    folder: Path,
    patterns: tuple[str, ...] = MODEL,
    progress: Progress = quiet,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """A folder with a repository's files at one commit; files of other names are left out.

    folder: where repositories are kept, one folder per commit.  A commit that is there needs no
    request.  note: called with what is left out.  Raises UsageError, NotFoundError, AuthError, and
    IntegrityError for more bytes than are allowed, and for others than those of the digests.
    """
    place = HfSource.parse(source)
    held = kept(source, folder, patterns)
    if held and (is_offline() or COMMIT.fullmatch(place.revision)):
        return held
    check_online(source)
    with client(headers=headers()) as session:
        commit = _commit(session, place, source)
        target = _target(place, commit, folder, patterns)
        with _locked(target):
            if not target.is_dir():
                files = _files(session, place, commit, patterns, source, note)
                _check_room(files, _partial(target), source)
                _fetch_all(session, place, commit, files, target, progress)
    write_text(_remembered(place, folder), commit + "\n")
    return target


def kept(source: str, folder: Path, patterns: tuple[str, ...] = MODEL) -> Path | None:
    """The folder that a source was fetched to before; of a branch or tag, as it was then."""
    place = HfSource.parse(source)
    remembered, commit = _remembered(place, folder), place.revision
    if remembered.is_file():
        commit = remembered.read_text(encoding="utf-8").strip()
    found = _target(place, commit, folder, patterns)
    return found if COMMIT.fullmatch(commit) and found.is_dir() else None


def _target(place: HfSource, commit: str, folder: Path, patterns: tuple[str, ...]) -> Path:
    """Where the files of one commit are kept; other files have another folder."""
    return folder / place.repository.replace("/", "--") / f"{commit}-{_kind(patterns)}"


def _kind(patterns: tuple[str, ...]) -> str:
    """What stands in a folder's name for the files that were asked for."""
    return hashlib.sha256("\0".join(patterns).encode()).hexdigest()[:8]


def _remembered(place: HfSource, folder: Path) -> Path:
    """Which commit a branch or tag was when it was fetched last."""
    names = (place.repository, "refs", place.revision)
    return folder.joinpath(*(name.replace("/", "--") for name in names))


def fetch_again(folder: Path) -> None:
    """Put a folder that `fetch` made in the place of itself, from its repository."""
    commit, _, kind = folder.name.partition("-")
    patterns = next((p for p in (MODEL, EXPERT_FILES) if _kind(p) == kind), None)
    place = HfSource(folder.parent.name.replace("--", "/", 1), commit)
    source = f"hf:{place.repository}@{commit}"
    if patterns is None:
        raise HubError(f"it is not known which files of {source} it has", "remove it")
    check_online(source)
    with client(headers=headers()) as session, _locked(folder):
        files = _files(session, place, commit, patterns, source)
        _fetch_all(session, place, commit, files, folder, quiet, replace=True)


def _partial(target: Path) -> Path:
    """Where files are while they are fetched."""
    return target.parent.parent.parent / "partial"


def _locked(target: Path) -> AbstractContextManager[None]:
    """One process at a time fetches from a repository."""
    mine = target.parent
    return locked(mine.parent.parent / "locks" / f"hf-{mine.name}")


def _commit(session: httpx.Client, place: HfSource, source: str) -> str:
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


def _files(
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
        wanted = NAME.fullmatch(name) and any(fnmatchcase(name, p) for p in patterns)
        # An adapter beside a model: transformers would load it too.
        if row.get("type") != "file" or not wanted or (patterns is MODEL and name in EXPERT_FILES):
            others.append(name)
            continue
        if name.lower() in files:
            raise IntegrityError(f"{source} has two files {name!r}", "use another revision")
        files[name.lower()] = _remote_file(name, row, source)
    if not any(name.endswith(".safetensors") for name in files):
        pickles = [_printable(name) for name in others if name.endswith(PICKLES)]
        only = f": only {pickles[0]}, and pickles are never read" if pickles else ""
        raise IntegrityError(f"{source} has no safetensors{only}", "ask its owner to convert it")
    others = [name for name in others if not any(fnmatchcase(name, p) for p in USUAL)]
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        note(f"{source}: left out {', '.join(map(_printable, sorted(others)[:8]))}{more}")
    return list(files.values())


def _printable(name: str) -> str:
    """A name that a server states, for a message: short, and without what moves a cursor."""
    return ascii(name[:80])[1:-1]


def _check_room(files: list[RemoteFile], partial: Path, source: str) -> None:
    """Refuse more bytes than the user allows, or than there is room for, before the first."""
    size = sum(file.size for file in files)
    check_size(source, size)
    begun = (partial / str(file.sha256) for file in files)
    ensure_space(partial, size - sum(path.stat().st_size for path in begun if path.is_file()))


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


def _fetch_all(
    session: httpx.Client,
    place: HfSource,
    commit: str,
    files: list[RemoteFile],
    target: Path,
    progress: Progress,
    replace: bool = False,
) -> None:
    """Fetch files, several at a time, into a folder that appears when all of them are there."""
    partial = _partial(target)
    done = dict.fromkeys((file.name for file in files), 0)
    size = sum(file.size for file in files)

    def fetch_one(file: RemoteFile, draft: Path) -> None:
        def note(bytes_done: int, _: int) -> None:
            done[file.name] = bytes_done
            progress(sum(done.values()), size)

        url = f"{endpoint()}/{place.repository}/resolve/{commit}/{quote(file.name)}"
        if file.sha256 is not None:
            _move(url, file, partial, draft / file.name, note)
            return
        content = fetch_small(session, url, file.size)
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if found != file.blob:
            raise IntegrityError(
                f"{shown(url)} is not the file that its repository lists",
                "it was changed on its way or at its source; try again",
            )
        (draft / file.name).write_bytes(content)
        note(len(content), 0)

    with new_folder(target, replace) as draft:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(partial_of(fetch_one, draft=draft), files):
                pass
        write_manifest(draft, {f.name: f.sha256 or sha256_of(draft / f.name) for f in files})


def _move(url: str, file: RemoteFile, partial: Path, target: Path, note: Progress) -> None:
    """Download a large file to where it belongs.

    Another process that wants the same content, of another repository, may take it away first.
    """
    while True:
        got = download(url, str(file.sha256), partial, note, headers=headers(), size=file.size)
        try:
            got.rename(target)
        except FileNotFoundError:
            continue
        return
