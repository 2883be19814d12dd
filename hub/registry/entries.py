"""Writing entries: registering experts, and removing them from the user's own registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from experthub.hub.errors import ConflictError, IntegrityError, UsageError
from experthub.hub.files import checksummed_text
from experthub.hub.files.atomic import hub_home, write_text
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.registry.expert import NAME, Expert
from experthub.hub.registry.layers import entry_path
from experthub.hub.registry.registry_file import RegistryFile, format_file, read_file


def _changing() -> AbstractContextManager[None]:
    """Let one process at a time change registries."""
    return hold_lock(hub_home() / "locks" / "registry")


def register(expert: Expert, file: Path | None = None) -> Path:
    """Write an entry. If it is there already, nothing changes.

    Args:
        expert: The entry.
        file: The registry file. The default is the user's own registry.

    Returns:
        The file that holds the entry.

    Raises:
        ConflictError: The name and version have other content there.
        UsageError: The file would be too long to be read.
    """
    path = file or entry_path(expert)
    with _changing():
        return _register(expert, path, checksummed_text.write if file is None else write_text)


def _register(expert: Expert, path: Path, write: Callable[[Path, str], None]) -> Path:
    """Write an entry into a file, beside the others in it."""
    content = read_file(path) if path.is_file() else RegistryFile(version=1)
    for known in content.experts:
        if known.reference == expert.reference:
            check_same_content(known, expert)
            if known == expert:
                return path
    others = [e for e in content.experts if e.reference != expert.reference]
    entries = sorted([*others, expert], key=lambda e: (e.name, e.version))
    record = RegistryFile(version=1, bases=content.bases, experts=entries)
    write(path, format_file(record, path))
    return path


def add_source(expert: Expert, source: str) -> Expert:
    """Record in the user's own registry one more source of an expert.

    Args:
        expert: The entry.
        source: The source.

    Returns:
        The entry with all its sources.

    Raises:
        ConflictError: The name and version have other content there.
    """
    known = expert.model_copy(update={"sources": list(dict.fromkeys([*expert.sources, source]))})
    register(known)
    return known


def remove(experts: Sequence[Expert]) -> None:
    """Remove experts from the user's own registry; their content stays until it is collected.

    Args:
        experts: The entries.
    """
    with _changing():
        for expert in experts:
            path = entry_path(expert)
            if path.is_file() and expert.digest in {e.digest for e in read_file(path).experts}:
                path.unlink()
            with suppress(OSError):
                path.parent.rmdir()


def check_writable(expert: Expert) -> None:
    """Check that a registry with this entry can be read again.

    Args:
        expert: The entry.

    Raises:
        IntegrityError: The entry is too long or too deep.
    """
    try:
        format_file(RegistryFile(version=1, experts=[expert]), entry_path(expert))
    except UsageError as error:
        raise IntegrityError(
            f"the description of {expert.name}: {error.message}", error.hint
        ) from None


def check_same_content(known: Expert, expert: Expert) -> None:
    """Check that two entries of one name and version have the same content.

    Args:
        known: The entry that is registered.
        expert: The other entry.

    Raises:
        ConflictError: Their digests differ.
    """
    if known.digest != expert.digest:
        raise ConflictError(
            f"{expert.reference} is {known.digest[:19]} already, and this is {expert.digest[:19]}",
            f"give it a new version: --version {expert.version + 1}",
        )


def next_version(name: str, experts: Iterable[Expert]) -> int:
    """Return the version after the newest one of a name.

    Args:
        name: The name.
        experts: The known entries.

    Returns:
        The version, 1 for a new name.
    """
    return max((e.version for e in experts if e.name == name), default=0) + 1


def check_name(name: str) -> str:
    """Check a name for an expert.

    Args:
        name: The name.

    Returns:
        The same name.

    Raises:
        UsageError: It has other characters than names may have, or too many.
    """
    if not re.fullmatch(NAME, name):
        raise UsageError(f"{name!r} is not a name", "use a-z, 0-9, '.', '_' and '-', at most 96")
    return name
