"""Writing registry entries of bases: register them, and remove them from the user's own registry."""

from __future__ import annotations

from pathlib import Path

from experthub.hub.errors import ConflictError, NotFoundError
from experthub.hub.files import checksummed_text
from experthub.hub.files.atomic import hub_home, write_text
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.files.spelling import suggest_name
from experthub.hub.registry.layers import BASE_ENTRY, user_folder
from experthub.hub.registry.registry import Registry
from experthub.hub.registry.registry_file import BaseEntry, RegistryFile, format_file, read_file


def register_base(
    name: str, entry: BaseEntry, registry: Registry, file: Path | None = None
) -> Path:
    """Write the entry of a base to a registry file. An entry that is there is not written again.

    Args:
        name: The name of the base.
        entry: The entry.
        registry: The registry, in which no other base may have the name.
        file: The registry file. The default is the base's own file in the user's registry.

    Returns:
        The file that holds the entry.

    Raises:
        ConflictError: Another base has this name.
        UsageError: The file would be too long to be read again.
    """
    path = file or user_folder() / name / BASE_ENTRY
    known = registry.list_bases().get(name)
    with hold_lock(hub_home() / "locks" / "registry"):
        content = read_file(path) if path.is_file() else RegistryFile(version=1)
        for other in filter(None, (content.bases.get(name), known)):
            if other.fingerprint != entry.fingerprint:
                raise ConflictError(
                    f"{name} is already a base with other weights, from {other.sources[0]}",
                    f"choose another name, or run hub base rm {name} if it is your own",
                )
        if content.bases.get(name) != entry:
            bases = dict(sorted({**content.bases, name: entry}.items()))
            record = RegistryFile(version=1, bases=bases, experts=content.experts)
            write = checksummed_text.write if file is None else write_text
            write(path, format_file(record, path))
    return path


def remove_base(name: str, registry: Registry) -> BaseEntry:
    """Remove a base from the user's own registry.

    Args:
        name: The name of the base.
        registry: The registry.

    Returns:
        The entry that was removed.

    Raises:
        NotFoundError: The user's own registry has no such base.
    """
    mine = registry.user.content.bases
    if name not in mine:
        files = [layer.path for layer in registry.layers if name in layer.content.bases]
        if files:
            raise NotFoundError(
                f"{name} is a base of {files[0]}, not of your own registry",
                f"remove its entry from {files[0]}",
            )
        raise NotFoundError(
            f"no registry has a base named {name!r}",
            suggest_name(name, mine) or "run hub base list",
        )
    with hold_lock(hub_home() / "locks" / "registry"):
        (user_folder() / name / BASE_ENTRY).unlink(missing_ok=True)
    return mine[name]
