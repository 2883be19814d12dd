"""Model repositories of the Hugging Face Hub, downloaded with verification of every byte.

The Hub's own client checks sizes, not digests, and starts again after a crash. Files are therefore
downloaded here, with continuation, against the digests that the repository lists: the sha256 of
large files, and the sha1 of the git blob for the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.atomic import (
    open_atomically,
    remove,
    sync_file,
    sync_folder,
    walk_files,
    write_text,
)
from experthub.hub.files.checksummed_text import MANIFEST, read_manifest, write_manifest
from experthub.hub.files.digests import sha256_of
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.files.path_checks import ensure_space
from experthub.hub.registry.file_patterns import list_fetched_files, list_file_patterns
from experthub.hub.transfer.remotes._download import download, fetch_small
from experthub.hub.transfer.remotes._hf_api import make_headers, read_endpoint
from experthub.hub.transfer.remotes._hf_files import (
    COMMIT,
    EARLIER_MODEL,
    MODEL,
    HfSource,
    RemoteFile,
    find_commit,
    list_files,
)
from experthub.hub.transfer.remotes._http import open_client, redact_url
from experthub.hub.transfer.remotes._limits import (
    Progress,
    check_online,
    check_size,
    ignore_progress,
    is_offline,
)

if TYPE_CHECKING:
    import httpx

AT_ONCE = 4
FOLDER = re.compile(r"[0-9a-f]{40}-[0-9a-f]{8}")  # The commit and the hash of the patterns.


def fetch(
    source: str,
    folder: Path,
    patterns: tuple[str, ...] = MODEL,
    progress: Progress = ignore_progress,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Path, dict[str, str]]:
    """Fetch the files of a repository at one commit into a folder.

    Other files of the repository are omitted. A commit that was fetched before needs no request.

    Args:
        source: `hf:org/name[@revision]`.
        folder: The folder of all repositories. Each commit gets a sub-folder.
        patterns: Shell patterns of the wanted files.
        progress: A progress callback.
        note: Receives a message about omitted files.

    Returns:
        The sub-folder, and the sha256 of its files by name if they were downloaded now.

    Raises:
        UsageError: The source is malformed.
        NotFoundError: The repository or the revision does not exist.
        AuthError: The user may not read the repository.
        IntegrityError: The files are larger than the user allows, or differ from their digests.
    """
    place = HfSource.parse(source)
    held = find_fetched(source, folder, patterns)
    if held and (is_offline() or COMMIT.fullmatch(place.revision)):
        return held, {}
    check_online(source)
    hashed: dict[str, str] = {}
    with open_client(headers=make_headers()) as session:
        commit = find_commit(session, place, source)
        target = _locate_folder(place, commit, folder, patterns)
        with _lock_repository(target):
            if not target.is_dir():
                files = list_files(session, place, commit, patterns, source, note)
                _check_room(files, _download_folder(target), source)
                hashed = _fetch_all(session, place, commit, files, target, progress)
    write_text(_locate_revision(place, folder), commit + "\n")
    return target, hashed


def verify_fetched(folder: Path) -> dict[str, str]:
    """Hash the files in a folder that `fetch` made; fetch them again if they differ.

    Args:
        folder: The folder.

    Returns:
        The sha256 of each file by name.
    """
    files = (p for p in walk_files(folder) if p.name != MANIFEST)
    hashed = {p.relative_to(folder).as_posix(): sha256_of(p) for p in files}
    came = read_manifest(folder)
    return hashed if came is None or came["files"] == hashed else fetch_again(folder)


def find_fetched(source: str, folder: Path, patterns: tuple[str, ...] = MODEL) -> Path | None:
    """Find the folder into which a source was fetched before, without a request.

    Args:
        source: `hf:org/name[@revision]`.
        folder: The folder of all repositories.
        patterns: Shell patterns of the wanted files.

    Returns:
        The sub-folder, or None. A branch or tag refers to the commit of its last fetch.
    """
    place = HfSource.parse(source)
    remembered, commit = _locate_revision(place, folder), place.revision
    if remembered.is_file():
        commit = remembered.read_text(encoding="utf-8").strip()
    found = _locate_folder(place, commit, folder, patterns)
    return found if COMMIT.fullmatch(commit) and found.is_dir() else None


def read_commit(folder: Path) -> str | None:
    """Read the commit in the name of a folder that `fetch` made.

    Args:
        folder: Any folder.

    Returns:
        The commit, 40 hexadecimal digits; None if the name is not that of such a folder.
    """
    return folder.name[:40] if FOLDER.fullmatch(folder.name) else None


def _locate_folder(place: HfSource, commit: str, folder: Path, patterns: tuple[str, ...]) -> Path:
    """Return the folder for the files of one commit; other patterns have another folder.

    A folder that an earlier version fetched stays in use, with the files that it has.
    """
    above = folder / place.repository.replace("/", "--")
    earlier = above / f"{commit}-{_hash_patterns(EARLIER_MODEL)}"
    if patterns is MODEL and earlier.is_dir():
        return earlier
    return above / f"{commit}-{_hash_patterns(patterns)}"


def _hash_patterns(patterns: tuple[str, ...]) -> str:
    """Return the part of a folder's name that stands for the wanted files."""
    return hashlib.sha256("\0".join(patterns).encode()).hexdigest()[:8]


def _locate_revision(place: HfSource, folder: Path) -> Path:
    """Return the file that remembers the commit of a branch or tag at its last fetch."""
    names = (place.repository, "refs", place.revision)
    return folder.joinpath(*(name.replace("/", "--") for name in names))


def fetch_again(folder: Path) -> dict[str, str]:
    """Replace a damaged folder that `fetch` made.

    Args:
        folder: The folder.

    Returns:
        The sha256 of each file by name.

    Raises:
        HubError: It is unknown which files the folder should have, or they cannot be fetched.
    """
    commit, _, kind = folder.name.partition("-")
    known = (MODEL, EARLIER_MODEL, list_fetched_files(), list_file_patterns())
    patterns = next((p for p in known if _hash_patterns(p) == kind), None)
    place = HfSource(folder.parent.name.replace("--", "/", 1), commit)
    source = f"hf:{place.repository}@{commit}"
    if patterns is None:
        raise HubError(
            f"{folder} has the files of {source} that match unknown patterns", f"remove {folder}"
        )
    check_online(source)
    with open_client(headers=make_headers()) as session, _lock_repository(folder):
        files = list_files(session, place, commit, patterns, source)
        return _fetch_all(session, place, commit, files, folder, ignore_progress)


def _download_folder(target: Path) -> Path:
    """Return the folder of incomplete downloads."""
    return target.parent.parent.parent / "partial"


def _lock_repository(target: Path) -> AbstractContextManager[None]:
    """Hold the lock that lets one process at a time fetch from a repository."""
    mine = target.parent
    return hold_lock(mine.parent.parent / "locks" / f"hf-{mine.name}")


def _check_room(files: list[RemoteFile], partial: Path, source: str) -> None:
    """Check that the user allows a download of this size, and that the disk has room for it."""
    size = sum(file.size for file in files)
    check_size(source, size)
    begun = (partial / file.sha256 for file in files if file.sha256)
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

    The files are collected in a draft. Intact files in it are not fetched again. The function
    returns the sha256 of each file by name.
    """
    done = dict.fromkeys((file.name for file in files), 0)
    size = sum(file.size for file in files)
    draft = target.with_name(f".{target.name}")
    folders = {(draft / file.name).parent for file in files} - {draft}
    for own in (draft, *folders):
        if not own.is_dir() or own.is_symlink():
            remove(own)  # Somebody else may have put a link there.
        own.mkdir(parents=True, exist_ok=True)

    def fetch_one(file: RemoteFile) -> str:
        def track(bytes_done: int, _: int) -> None:
            done[file.name] = bytes_done
            progress(sum(done.values()), size)

        path = draft / file.name
        url = f"{read_endpoint()}/{place.repository}/resolve/{commit}/{quote(file.name)}"
        if file.sha256 is None:
            content = fetch_small(session, url, file.size)
            if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != file.blob:
                raise IntegrityError(
                    f"{redact_url(url)} differs from the file that its repository lists",
                    "try again: the file was changed at its source or during the transfer",
                )
            with open_atomically(path) as whole:
                whole.write(content)
            found = hashlib.sha256(content).hexdigest()
        else:
            found = file.sha256
            if path.is_symlink() or not path.is_file() or sha256_of(path) != found:
                _download_large(url, file, _download_folder(target), path, track)
        track(file.size, 0)
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        digests = list(pool.map(fetch_one, files))
    hashed = {file.name: sha256 for file, sha256 in zip(files, digests, strict=True)}
    for path in sorted(draft.rglob("*")):
        if path.relative_to(draft).as_posix() in hashed:
            sync_file(path)
        elif path not in folders:
            remove(path)
    write_manifest(draft, hashed)
    remove(target)
    draft.rename(target)
    sync_folder(target.parent)
    return hashed


def _download_large(
    url: str, file: RemoteFile, partial: Path, target: Path, progress: Progress
) -> None:
    """Download a large file to its place in the draft of a folder."""
    while True:
        got = download(
            url, str(file.sha256), partial, progress, headers=make_headers(), size=file.size
        )
        # Another process may have moved the same content of another repository away.
        with suppress(FileNotFoundError):
            got.rename(target)
            return
