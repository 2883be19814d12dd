"""The layers of a registry: single files, and the user's own registry."""

from __future__ import annotations

from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experthub.hub.files.atomic import hub_home, list_folder
from experthub.hub.registry.expert import Expert, make_source_absolute
from experthub.hub.registry.registry_file import BaseEntry, RegistryFile, read_file

BASE_ENTRY = "base.yaml"  # The file with the entry of a base, in the folder with its name.


@dataclass(frozen=True)
class Layer:
    """One registry file. Relative sources in it start from its folder.

    Args:
        path: The path of the file.
        content: The validated content.
    """

    path: Path
    content: RegistryFile

    @property
    def folder(self) -> Path:
        """The folder of the file, as an absolute path."""
        return self.path.resolve().parent

    @cached_property
    def by_name(self) -> dict[str, list[Expert]]:
        """The entries of each expert name, in the order of the file."""
        found: dict[str, list[Expert]] = {}
        for expert in self.content.experts:
            found.setdefault(expert.name, []).append(expert)
        return found


def read_layer(path: Path) -> Layer:
    """Read a registry file, and make the sources of its experts absolute.

    Args:
        path: The path of the file.

    Returns:
        The layer.

    Raises:
        UsageError: The file is malformed.
    """
    layer = Layer(path, read_file(path))
    experts = [_make_sources_absolute(expert, layer.folder) for expert in layer.content.experts]
    return Layer(path, layer.content.model_copy(update={"experts": experts}))


def _make_sources_absolute(expert: Expert, folder: Path) -> Expert:
    """Return an entry whose relative sources were made absolute."""
    return expert.model_copy(
        update={"sources": [make_source_absolute(source, folder) for source in expert.sources]}
    )


def user_folder() -> Path:
    """Return the folder of the user's own registry.

    Returns:
        The path of the folder, whether it exists or not.
    """
    return hub_home() / "registry"


def read_user_layer(without: Set[Path]) -> Layer:
    """Read the user's own registry as one layer.

    It has one small file per expert and version, and one per base.

    Args:
        without: The paths of files to skip.

    Returns:
        The layer.

    Raises:
        UsageError: A file is malformed.
    """
    folder = user_folder()
    experts: list[Expert] = []
    bases: dict[str, BaseEntry] = {}
    for path in list_entry_files(folder):
        if path not in without:
            with suppress(FileNotFoundError):  # Another process removed it.
                content = read_layer(path).content
                experts += content.experts
                bases |= content.bases
    record = RegistryFile(version=1, bases=bases, experts=experts)
    return Layer(folder / "registry.yaml", record)


def list_entry_files(folder: Path) -> list[Path]:
    """List the entry files of the user's own registry, which other processes may change meanwhile.

    Args:
        folder: The folder of the registry.

    Returns:
        The paths of the entry files.
    """
    paths = (path for place in list_folder(folder) for path in list_folder(place))
    return [path for path in paths if path.suffix == ".yaml"]


def entry_path(expert: Expert) -> Path:
    """Return the path of an entry's file in the user's own registry.

    Args:
        expert: The entry.

    Returns:
        The path, whether the file exists or not.
    """
    return user_folder() / expert.name / f"{expert.version}.yaml"
