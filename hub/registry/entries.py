"""Writing registry entries: register experts, and remove them from the user's own registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from experthub.hub.errors import ConflictError, IntegrityError, UsageError
from experthub.hub.files import checksummed_text
from experthub.hub.files.atomic import hub_home, write_text
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.registry.expert import NAME, Expert, find_origin
from experthub.hub.registry.layers import entry_path
from experthub.hub.registry.registry_file import RegistryFile, format_file, read_file

MAX_VERSION = 999_999  # of an expert that is registered; a registry file may have up to 9 digits


def _lock_registries() -> AbstractContextManager[None]:
    """Hold the lock that lets one process at a time change registries."""
    return hold_lock(hub_home() / "locks" / "registry")


def register(expert: Expert, file: Path | None = None) -> Path:
    """Write an entry to a registry file. An entry that is there already is not written again.

    Args:
        expert: The entry.
        file: The registry file. The default is the entry's own file in the user's registry.

    Returns:
        The file that holds the entry.

    Raises:
        ConflictError: The name and version are registered there with other content.
        UsageError: The file would be too long to be read again.
    """
    path = file or entry_path(expert)
    with _lock_registries():
        return _register(expert, path, checksummed_text.write if file is None else write_text)


def _register(expert: Expert, path: Path, write: Callable[[Path, str], None]) -> Path:
    """Write an entry into a registry file, and keep the other entries."""
    content = read_file(path) if path.is_file() else RegistryFile(version=1)
    check_conflict(expert, content.experts)
    if expert in content.experts:
        return path
    others = [e for e in content.experts if e.reference != expert.reference]
    entries = sorted([*others, expert], key=lambda e: (e.name, e.version))
    record = RegistryFile(version=1, bases=content.bases, experts=entries)
    write(path, format_file(record, path))
    return path


def add_source(expert: Expert, source: str) -> Expert:
    """Add a source to an expert's entry in the user's own registry.

    Args:
        expert: The entry.
        source: The new source. It is tried after the known ones.

    Returns:
        The entry with all its sources.

    Raises:
        ConflictError: The name and version are registered there with other content.
    """
    known = expert.model_copy(update={"sources": list(dict.fromkeys([*expert.sources, source]))})
    register(known)
    return known


def remove(experts: Sequence[Expert]) -> None:
    """Remove experts from the user's own registry.

    Their content stays in the store until `hub gc` deletes it.

    Args:
        experts: The entries.
    """
    with _lock_registries():
        for expert in experts:
            path = entry_path(expert)
            if path.is_file() and expert.digest in {e.digest for e in read_file(path).experts}:
                path.unlink()
            with suppress(OSError):
                path.parent.rmdir()


def check_writable(expert: Expert) -> None:
    """Check that an entry can be read again from the registry file that will hold it.

    Args:
        expert: The entry.

    Raises:
        IntegrityError: The entry is too long, or nested too deeply.
    """
    try:
        format_file(RegistryFile(version=1, experts=[expert]), entry_path(expert))
    except UsageError as error:
        raise IntegrityError(
            f"the description of {expert.name}: {error.message}", error.hint
        ) from None


def check_conflict(expert: Expert, experts: Iterable[Expert]) -> None:
    """Check that no known entry has the name and version of an expert and other content.

    Args:
        expert: The expert.
        experts: The known entries.

    Raises:
        ConflictError: An entry with this name and version has another digest.
    """
    for known in experts:
        if known.reference == expert.reference and known.digest != expert.digest:
            raise ConflictError(
                f"{expert.reference} is already registered as {known.digest[:19]}, "
                f"but this content is {expert.digest[:19]}",
                f"pass --version {expert.version + 1} to register a new version",
            )


class NameConflictError(ConflictError):
    """An error for content that would take over a name from an expert of another origin.

    Args:
        expert: The entry of the content.
        known: The newest entry that has the name.
    """

    def __init__(self, expert: Expert, known: Expert) -> None:
        source = expert.sources[0]
        super().__init__(
            f"{source} would become {expert.reference}, but {known.reference} "
            f"came from another place, {known.sources[0]}",
            f"choose another name with hub pull {source} --name NAME, "
            f"or pass --yes to accept {expert.reference}",
        )
        self.reference = expert.reference


def check_origin(expert: Expert, experts: Iterable[Expert]) -> None:
    """Check that content may have its name.

    It may if no entry has the name, or if an entry with the name has the same content or came from
    the same place. A bare name refers to the newest version. Any other content would therefore
    silently replace the expert that the user knows.

    Args:
        expert: The entry of the content.
        experts: The known entries.

    Raises:
        NameConflictError: The name belongs to experts from other places.
    """
    same = [known for known in experts if known.name == expert.name]
    origins = set(map(find_origin, expert.sources))
    trusted = any(
        known.digest == expert.digest or origins & set(map(find_origin, known.sources))
        for known in same
    )
    if same and not trusted:
        raise NameConflictError(expert, max(same, key=lambda known: known.version))


def check_version(name: str, version: int) -> int:
    """Check that a version is not so large that no newer one could follow it.

    Args:
        name: The name of the expert.
        version: The version.

    Returns:
        The same version.

    Raises:
        UsageError: The version is above `MAX_VERSION`.
    """
    if version > MAX_VERSION:
        raise UsageError(
            f"the version {version} of {name} is above {MAX_VERSION}",
            f"use a smaller version or another name; hub rm {name}@VERSION removes a wrong version",
        )
    return version


def find_next_version(name: str, experts: Iterable[Expert]) -> int:
    """Find the version that follows the newest version of a name.

    Args:
        name: The name.
        experts: The known entries.

    Returns:
        The next version; 1 for a new name.

    Raises:
        UsageError: The newest version is the largest one that is allowed.
    """
    newest = max((e.version for e in experts if e.name == name), default=0)
    return check_version(name, newest + 1)


def check_name(name: str) -> str:
    """Check the name of an expert.

    Args:
        name: The name.

    Returns:
        The same name.

    Raises:
        UsageError: The name is too long, or has characters that are not allowed.
    """
    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"{name!r} is not a name",
            "use a-z, 0-9, '.', '_' and '-', at most 96; start with a letter or a digit",
        )
    return name
