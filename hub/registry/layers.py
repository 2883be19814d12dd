"""The layers that a registry consists of: single files, and the user's own registry."""

from __future__ import annotations

from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experthub.hub.files.atomic import hub_home, list_folder
from experthub.hub.registry.expert import Expert, absolute_source
from experthub.hub.registry.registry_file import RegistryFile, read_file


@dataclass(frozen=True)
class Layer:
    """One registry file. Its relative sources are relative to its folder.

    Args:
        path: The file.
        content: The record in it.
    """

    path: Path
    content: RegistryFile

    @property
    def folder(self) -> Path:
        return self.path.resolve().parent

    @cached_property
    def by_name(self) -> dict[str, list[Expert]]:
        """Expert name -> all its entries, in the order of the file."""
        found: dict[str, list[Expert]] = {}
        for expert in self.content.experts:
            found.setdefault(expert.name, []).append(expert)
        return found


def read_layer(path: Path) -> Layer:
    """Read a registry file, and make the relative sources of its experts absolute.

    Args:
        path: The file.

    Returns:
        The layer.

    Raises:
        UsageError: The file is malformed.
    """
    layer = Layer(path, read_file(path))
    experts = [_absolute(expert, layer.folder) for expert in layer.content.experts]
    return Layer(path, layer.content.model_copy(update={"experts": experts}))


def _absolute(expert: Expert, folder: Path) -> Expert:
    """Return an entry whose relative sources are made absolute."""
    return expert.model_copy(
        update={"sources": [absolute_source(source, folder) for source in expert.sources]}
    )


def user_folder() -> Path:
    """Return the folder of the user's own registry."""
    return hub_home() / "registry"


def user_layer(without: Set[Path]) -> Layer:
    """Read the user's own registry, one small file per expert and version, as one layer.

    Args:
        without: Files that are left out.

    Returns:
        The layer.

    Raises:
        UsageError: A file is malformed.
    """
    folder = user_folder()
    experts: list[Expert] = []
    for path in entry_files(folder):
        if path not in without:
            with suppress(FileNotFoundError):  # It was removed at this moment.
                experts += read_layer(path).content.experts
    return Layer(folder / "registry.yaml", RegistryFile(version=1, experts=experts))


def entry_files(folder: Path) -> list[Path]:
    """List the entries of the user's own registry; other processes may change them meanwhile.

    Args:
        folder: The folder of the registry.

    Returns:
        The paths of the entries.
    """
    names = (path for name in list_folder(folder) for path in list_folder(name))
    return [path for path in names if path.suffix == ".yaml"]


def entry_path(expert: Expert) -> Path:
    """Return where the user's own registry keeps an entry.

    Args:
        expert: The entry.

    Returns:
        The path of its file.
    """
    return user_folder() / expert.name / f"{expert.version}.yaml"
