"""The only place that writes files: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from experthub.hub.errors import ConflictError


def hub_home() -> Path:
    """Where the hub keeps its store, registry and tasks: `HUB_HOME` or `~/.experthub`."""
    return Path(os.environ.get("HUB_HOME") or Path.home() / ".experthub")


@contextmanager
def written(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name whole, or not at all.

    Where the file system can, it has no name while it is written: nothing stays of a killed process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name[:80]}.{secrets.token_hex(8)}")
    handle, unnamed = _open_draft(draft)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(handle, mode)
            os.fsync(handle)
            if unnamed:
                # A link takes no file's place; with a folder's handle it is linkat, which follows.
                os.link(f"/proc/self/fd/{handle}", draft.name, dst_dir_fd=folder)
        draft.replace(path)
        os.fsync(folder)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(folder)


def _open_draft(path: Path) -> tuple[int, bool]:
    """A new file to write, and whether it has no name yet."""
    try:
        return os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o600), True
    except (AttributeError, OSError):
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), False


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
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well; its files are fsynced.

    Raises FileExistsError when the name is taken by anything but an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name[:80]}.", dir=path.parent))
    try:
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                sync_file(file)
        draft.chmod(0o755)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(path.parent)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for as long as the block lasts; one that a killed process left goes with the next."""
    drafts = hub_home() / "drafts"
    clear_drafts()
    with locked(hub_home() / "locks" / "drafts", shared=True):
        drafts.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=drafts))
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(handle)


def clear_drafts() -> None:
    """Remove the scratch folders of processes that are no more."""
    with locked(hub_home() / "locks" / "drafts"):
        for left in (hub_home() / "drafts").glob("*"):
            if not in_use(left):
                shutil.rmtree(left)


def in_use(path: Path) -> bool:
    """Whether a process holds a lock on a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def check_free(folder: Path) -> None:
    """Raise ConflictError unless the path is free for a new folder."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConflictError(f"{folder} is in use", "name a new folder")


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
