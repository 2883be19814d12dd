"""The only module that writes files: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from experthub.hub.files.digests import format_json
from experthub.hub.files.file_locks import lock_if_unused

DRAFT = re.compile(r"\..+\.[0-9a-f]{16}", re.S)  # the name of a file or folder being written


def hub_home() -> Path:
    """Return the folder of the store, the registry and the tasks.

    Returns:
        `HUB_HOME`, or `~/.experthub` if this variable is not set.
    """
    return Path(os.environ.get("HUB_HOME") or Path.home() / ".experthub")


@contextmanager
def open_atomically(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under its name complete, or not at all.

    If the file system supports it, the file has no name while it is written. A killed process
    then leaves nothing behind.

    Args:
        path: The file to write; its folder is created if it does not exist.
        mode: The permissions of the file, from which the umask takes some away.

    Yields:
        The open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    draft: Path | None = None
    try:
        handle, draft = _open_draft(path, mode)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
            draft = draft or _link(handle, path, folder)
            if draft:
                draft.replace(path)
        os.fsync(folder)
    except BaseException:
        if draft:
            draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(folder)


def _open_draft(path: Path, mode: int) -> tuple[int, Path | None]:
    """Open a new file for writing; return its handle, and its path if it has a name."""
    try:
        return os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, mode), None
    except (AttributeError, OSError):
        sweep(path)
    while True:
        draft = _draft_of(path)
        handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # No process removed the draft before it was locked.
            return handle, draft
        os.close(handle)


def _link(handle: int, path: Path, folder: int) -> Path | None:
    """Give an unnamed file its name, or the name of a draft if its name is taken."""
    # A link cannot replace a file. With `dst_dir_fd` Python calls linkat, which follows /proc.
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
    """Return a new name beside a path for its draft, which its writer keeps locked."""
    return path.with_name(f".{path.name[:80]}.{secrets.token_hex(8)}")


def find_drafts(folder: Path, name: str = "") -> list[Path]:
    """Find the drafts in a folder, including those that a process is writing.

    Args:
        folder: The folder to search, without its sub-folders.
        name: The name of the file that the drafts belong to; all drafts by default.

    Returns:
        The paths of the drafts, sorted.
    """
    start = f".{name[:80]}." if name else "."
    return [p for p in list_folder(folder) if p.name.startswith(start) and DRAFT.fullmatch(p.name)]


def list_folder(folder: Path) -> list[Path]:
    """List the files and folders in a folder.

    Args:
        folder: The folder.

    Returns:
        The sorted paths; an empty list if the folder does not exist or is not a folder.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder except drafts.

    Args:
        folder: The folder; files that another process removes meanwhile are omitted.

    Yields:
        The paths of the files, sorted within each folder.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not DRAFT.fullmatch(name))
        yield from (Path(place, name) for name in sorted(names) if not DRAFT.fullmatch(name))


def sweep(path: Path) -> None:
    """Remove the drafts of a path that killed processes left.

    Args:
        path: The file or folder that the drafts were to become.
    """
    for draft in find_drafts(path.parent, path.name):
        with lock_if_unused(draft) as free:
            if free:
                remove(draft)


def remove(path: Path) -> None:
    """Delete a file, or a folder with its content, if it exists.

    Args:
        path: The file or folder.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a folder so that no process sees a part of it, even if this process is killed.

    Args:
        folder: The folder, which must exist.
    """
    draft = _draft_of(folder)
    folder.rename(draft)
    remove(draft)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Args:
        path: The file.
        text: Its content, written as UTF-8.
    """
    with open_atomically(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically.

    Args:
        path: The file.
        value: Plain values.
    """
    write_text(path, format_json(value))


@contextmanager
def open_draft_folder(path: Path) -> Iterator[Path]:
    """Create a locked folder beside a path, and remove it after the block.

    Args:
        path: The path that the folder belongs to. Folders of killed processes are removed first.

    Yields:
        The path of the new folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    while True:  # Another process may remove the draft before it is locked.
        draft = _draft_of(path)
        draft.mkdir(0o700)
        try:
            handle = os.open(draft, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        if draft.is_dir():
            break
        os.close(handle)
    try:
        yield draft
    finally:
        remove(draft)
        os.close(handle)


@contextmanager
def create_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Create a folder that appears under its name only if the block succeeds.

    Args:
        path: The path of the folder.
        replace: Replace the file or folder that has this name.

    Yields:
        A draft folder to fill; its files are fsynced before it gets its name.

    Raises:
        FileExistsError: The name is taken by a folder that is not empty, and `replace` is false.
        OSError: The name is taken by a file, or the folder cannot be written.
    """
    with open_draft_folder(path) as draft:
        mode = _read_usual_mode(draft)
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                file.chmod(mode & 0o666)
                sync_file(file)
        sync_folder(draft)
        draft.chmod(mode)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        old = _draft_of(path)
        if replace and path.exists():
            path.rename(old)
        try:
            draft.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # Which one depends on the system.
                raise FileExistsError(errno.EEXIST, "the folder is not empty", str(path)) from None
            raise
        remove(old)
    sync_folder(path.parent)


def _read_usual_mode(folder: Path) -> int:
    """Return the mode of a new folder, which the umask decides; only this user sees the probe."""
    probe = folder / "mode"
    probe.mkdir()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    return mode


def sync_file(path: Path) -> None:
    """Write the content of a file to the disk.

    Args:
        path: The file.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Write the entries of a folder to the disk.

    Args:
        path: The folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
