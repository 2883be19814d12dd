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

from experthub.hub.errors import ConflictError, HubError


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
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
                sync_file(file)
        draft.chmod(0o755)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
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
