"""Model repositories of the Hugging Face Hub, read with every byte checked.

The Hub's own client checks sizes, not digests, and begins again after a crash; so files are fetched
here, ranged and resumable, against the digests that the repository's tree states: sha256 for large
files, git's sha1 of a blob for the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.atomic import remove, sync_file, sync_folder, write_text
from experthub.hub.files.checksummed_text import MANIFEST, read_manifest, write_manifest
from experthub.hub.files.digests import sha256_of
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.files.path_checks import ensure_space
from experthub.hub.registry.expert import expert_files
from experthub.hub.transfer.remotes._hf_api import endpoint, headers
from experthub.hub.transfer.remotes._hf_files import (
    COMMIT,
    MODEL,
    HfSource,
    RemoteFile,
    commit_of,
    files_of,
)
from experthub.hub.transfer.remotes._http import (
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

if TYPE_CHECKING:
    import httpx

AT_ONCE = 4
FOLDER = re.compile(r"[0-9a-f]{40}-[0-9a-f]{8}")  # of a commit: what was asked for of it


def fetch(
    source: str,
    folder: Path,
    patterns: tuple[str, ...] = MODEL,
    progress: Progress = quiet,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Path, dict[str, str]]:
    """A folder with a repository's files at one commit; files of other names are left out.

    With it, if it was not here before, the sha256 of its files.  folder: where repositories are
    kept, one folder per commit.  A commit that is there needs no request.  note: called with what
    is left out.  Raises UsageError, NotFoundError, AuthError, and IntegrityError for more bytes
    than are allowed, and for others than those of the digests.
    """
    place = HfSource.parse(source)
    held = kept(source, folder, patterns)
    if held and (is_offline() or COMMIT.fullmatch(place.revision)):
        return held, {}
    check_online(source)
    hashed: dict[str, str] = {}
    with client(headers=headers()) as session:
        commit = commit_of(session, place, source)
        target = _target(place, commit, folder, patterns)
        with _locked(target):
            if not target.is_dir():
                files = files_of(session, place, commit, patterns, source, note)
                _check_room(files, _partial(target), source)
                hashed = _fetch_all(session, place, commit, files, target, progress)
    write_text(_remembered(place, folder), commit + "\n")
    return target, hashed


def checked(folder: Path) -> dict[str, str]:
    """The sha256 of the files in a folder that `fetch` made; one that is not as it came is fetched again."""
    hashed = {p.name: sha256_of(p) for p in folder.iterdir() if p.name != MANIFEST}
    came = read_manifest(folder)
    return hashed if came is None or came["files"] == hashed else fetch_again(folder)


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


def fetch_again(folder: Path) -> dict[str, str]:
    """Put a folder that `fetch` made in the place of itself, from its repository; its files' sha256."""
    commit, _, kind = folder.name.partition("-")
    patterns = next((p for p in (MODEL, expert_files()) if _kind(p) == kind), None)
    place = HfSource(folder.parent.name.replace("--", "/", 1), commit)
    source = f"hf:{place.repository}@{commit}"
    if patterns is None:
        raise HubError(f"it is not known which files of {source} it has", "remove it")
    check_online(source)
    with client(headers=headers()) as session, _locked(folder):
        files = files_of(session, place, commit, patterns, source)
        return _fetch_all(session, place, commit, files, folder, quiet)


def _partial(target: Path) -> Path:
    """Where files are while they are fetched."""
    return target.parent.parent.parent / "partial"


def _locked(target: Path) -> AbstractContextManager[None]:
    """One process at a time fetches from a repository."""
    mine = target.parent
    return hold_lock(mine.parent.parent / "locks" / f"hf-{mine.name}")


def _check_room(files: list[RemoteFile], partial: Path, source: str) -> None:
    """Refuse more bytes than the user allows, or than there is room for, before the first."""
    size = sum(file.size for file in files)
    check_size(source, size)
    begun = (partial / str(file.sha256) for file in files)
    ensure_space(partial, size - sum(path.stat().st_size for path in begun if path.is_file()))


def _fetch_all(
    session: httpx.Client,
    place: HfSource,
    commit: str,
    files: list[RemoteFile],
    target: Path,
    progress: Progress,
) -> dict[str, str]:
    """Fetch files, several at a time, into a folder that appears when all of them are there.

    Until then it is a draft, and what is whole in it is not fetched again.  Returns their sha256.
    """
    done = dict.fromkeys((file.name for file in files), 0)
    size = sum(file.size for file in files)
    draft = target.with_name(f".{target.name}")
    draft.mkdir(parents=True, exist_ok=True)

    def fetch_one(file: RemoteFile) -> str:
        def note(bytes_done: int, _: int) -> None:
            done[file.name] = bytes_done
            progress(sum(done.values()), size)

        path = draft / file.name
        url = f"{endpoint()}/{place.repository}/resolve/{commit}/{quote(file.name)}"
        if file.sha256 is None:
            content = fetch_small(session, url, file.size)
            if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != file.blob:
                raise IntegrityError(
                    f"{shown(url)} is not the file that its repository lists",
                    "it was changed on its way or at its source; try again",
                )
            path.write_bytes(content)
            found = hashlib.sha256(content).hexdigest()
        elif path.is_file() and sha256_of(path) == file.sha256:
            found = file.sha256
        else:
            found = _move(url, file, _partial(target), path, note)
        note(file.size, 0)
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        digests = list(pool.map(fetch_one, files))
    hashed = {file.name: sha256 for file, sha256 in zip(files, digests, strict=True)}
    for path in draft.iterdir():
        sync_file(path) if path.name in hashed else path.unlink()
    write_manifest(draft, hashed)
    remove(target)
    draft.rename(target)
    sync_folder(target.parent)
    return hashed


def _move(url: str, file: RemoteFile, partial: Path, target: Path, note: Progress) -> str:
    """Download a large file to where it belongs; its sha256.

    Another process that wants the same content, of another repository, may take it away first.
    """
    sha256 = str(file.sha256)
    while True:
        got = download(url, sha256, partial, note, headers=headers(), size=file.size)
        try:
            got.rename(target)
        except FileNotFoundError:
            continue
        return sha256
