"""The only place that writes files: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from experthub.hub.errors import ConflictError, HubError, UsageError

DRAFT = re.compile(r"\..+\.[0-9a-f]{16}", re.S)


def hub_home() -> Path:
    """Where the hub keeps its store, registry and tasks: `HUB_HOME` or `~/.experthub`."""
    return Path(os.environ.get("HUB_HOME") or Path.home() / ".experthub")


@contextmanager
def written(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name whole, or not at all.

    Where the file system can, it has no name while it is written: nothing stays of a killed process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    draft: Path | None = None
    try:
        handle, draft = _open_draft(path)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(handle, mode)
            os.fsync(handle)
            draft = draft or _named(handle, path, folder)
            if draft:
                draft.replace(path)
        os.fsync(folder)
    except BaseException:
        if draft:
            draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(folder)


def _open_draft(path: Path) -> tuple[int, Path | None]:
    """A new file to write, and its name if it has one, locked then."""
    try:
        return os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o600), None
    except (AttributeError, OSError):
        sweep(path)
    while True:
        draft = _draft_of(path)
        handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # nobody took it for abandoned before it was locked
            return handle, draft
        os.close(handle)


def _named(handle: int, path: Path, folder: int) -> Path | None:
    """Give an unnamed file its name; where that is taken, the name of a draft, which can replace it."""
    # A link takes no file's place; with a folder's handle it is linkat, which follows.
    source = f"/proc/self/fd/{handle}"
    try:
        os.link(source, path.name, dst_dir_fd=folder)
        return None
    except FileExistsError:
        sweep(path)
    fcntl.flock(handle, fcntl.LOCK_EX)
    draft = _draft_of(path)
    os.link(source, draft.name, dst_dir_fd=folder)
    return draft


def _draft_of(path: Path) -> Path:
    """A name beside a path for what is to become it; whoever writes there keeps it locked."""
    return path.with_name(f".{path.name[:80]}.{secrets.token_hex(8)}")


def drafts(folder: Path, name: str = "") -> list[Path]:
    """The drafts in a folder, all or those of a name, whether somebody writes them or not."""
    start = f".{name[:80]}." if name else "."
    return [p for p in listing(folder) if p.name.startswith(start) and DRAFT.fullmatch(p.name)]


def listing(folder: Path) -> list[Path]:
    """What is in a folder; nothing when it is gone at this moment, or is none."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, but for drafts; what is gone at this moment is left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not DRAFT.fullmatch(name))
        yield from (Path(place, name) for name in sorted(names) if not DRAFT.fullmatch(name))


def sweep(path: Path) -> None:
    """Remove the drafts of a path that killed processes left."""
    for draft in drafts(path.parent, path.name):
        with unused(draft) as free:
            if free:
                remove(draft)


@contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether a file or folder is here, and locked by no process; inside, none can lock it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a folder that counts as a whole: nobody sees a part of it, whenever this is killed."""
    draft = _draft_of(folder)
    folder.rename(draft)
    remove(draft)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, atomically."""
    with written(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """A value as JSON for people."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A folder beside a path, for as long as the block lasts.

    It is locked; what killed processes left of such folders is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    while True:
        draft = _draft_of(path)
        draft.mkdir(0o700)
        handle = os.open(draft, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if draft.is_dir():  # nobody took it for abandoned before it was locked
            break
        os.close(handle)
    try:
        yield draft
    finally:
        remove(draft)
        os.close(handle)


@contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well; its files are fsynced.

    replace: in the place of the one that is there.  Otherwise raises FileExistsError when the name
    is taken by anything but an empty folder.
    """
    with draft_folder(path) as draft:
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                sync_file(file)
        sync_folder(draft)
        draft.chmod(0o755)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        old = _draft_of(path)
        if replace and path.exists():
            path.rename(old)
        draft.rename(path)
        remove(old)
    sync_folder(path.parent)


def ensure_space(folder: Path, needed: int) -> None:
    """Raise HubError unless the disk under the folder has the bytes and a little to spare."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + (64 << 20):
        raise HubError(
            f"{folder} has {free >> 20} MiB free, {needed >> 20} MiB are needed",
            "make room, or set HUB_HOME to a larger disk",
        )


def check_free(folder: Path) -> None:
    """Raise ConflictError unless the path is free for a new folder."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConflictError(f"{folder} is in use", "name a new folder")


def check_file(path: Path) -> None:
    """Raise UsageError unless the path can be that of a file: it is one, or is free."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no file", "name another one")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{path}: {above} is no folder", "name a file in a folder")


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """One process at a time inside, or any number that share it; the lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: one value, one text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(value: object) -> str:
    """`sha256:<hex>` of a value's canonical JSON."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()
