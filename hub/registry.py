"""Registries: names for digests, in layers of which the nearest wins."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from experthub.hub import _yaml
from experthub.hub._files import hub_home, write_text
from experthub.hub._yaml import Closed, did_you_mean
from experthub.hub.errors import ConflictError, HubError, NotFoundError, UsageError
from experthub.hub.expert import NAME, Digest, Expert, Reference
from pydantic import Field, StringConstraints, field_validator

HEX = r"^[0-9a-f]{64}$"


class BaseEntry(Closed):
    """A base model: where to get it, and how to know that it is the one meant."""

    sources: Annotated[list[str], Field(min_length=1)]
    sha256: Annotated[str, StringConstraints(pattern=HEX)] | None = None
    fingerprint: Digest | None = None
    aka: list[str] = []
    license: str | None = None


class RegistryFile(Closed):
    """registry.yaml, version 1."""

    version: Literal[1]
    bases: dict[str, BaseEntry] = {}
    experts: list[Expert] = []

    @field_validator("bases")
    @classmethod
    def _names(cls, bases: dict[str, BaseEntry]) -> dict[str, BaseEntry]:
        for name in bases:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"{name!r} is not a name")
        return bases


@dataclass(frozen=True)
class Layer:
    """One registry file; relative sources are relative to its folder."""

    path: Path
    content: RegistryFile

    @property
    def folder(self) -> Path:
        return self.path.resolve().parent


@dataclass(frozen=True)
class Registry:
    """Layers of registries, nearest first: the first that knows a name wins."""

    layers: tuple[Layer, ...]

    @classmethod
    def read(cls, file: Path | None = None) -> Registry:
        """The file given, the project's, the user's own, and the starter registry.

        file: a registry to look in before all others.  Raises UsageError for a malformed layer,
        NotFoundError for a missing file.
        """
        paths: list[Path] = []
        if file is not None:
            if not file.is_file():
                raise NotFoundError(f"there is no registry {file}", "name a registry.yaml")
            paths.append(file)
        here = Path.cwd()
        found = next(
            (d / "registry.yaml" for d in (here, *here.parents) if (d / "registry.yaml").is_file()),
            None,
        )
        if found:
            paths.append(found)
        paths += sorted((hub_home() / "registry").glob("*/*.yaml"))
        starter = Path(__file__).with_name("registry.yaml")
        if starter.is_file():
            paths.append(starter)
        unique = {path.resolve(): path for path in paths}
        return cls(tuple(_read_layer(path) for path in unique.values()))

    def experts(self) -> list[Expert]:
        """Every expert that a name can reach, by name and version."""
        found: dict[tuple[str, int], Expert] = {}
        for name in {e.name for layer in self.layers for e in layer.content.experts}:
            for expert in self._versions(name):
                found.setdefault((expert.name, expert.version), expert)
        return [found[key] for key in sorted(found)]

    def bases(self) -> dict[str, BaseEntry]:
        """Every base, by name."""
        merged: dict[str, BaseEntry] = {}
        for layer in reversed(self.layers):
            merged |= layer.content.bases
        return dict(sorted(merged.items()))

    def _versions(self, name: str) -> list[Expert]:
        """All versions of a name; the user's own layers, one file each, count as one."""
        entries: dict[int, Expert] = {}
        for layer in self.layers:
            for expert in layer.content.experts:
                if expert.name == name:
                    entries.setdefault(expert.version, absolute(expert, layer.folder))
        return [entries[version] for version in sorted(entries)]

    def expert(self, reference: Reference) -> Expert:
        """The expert that a name means: the newest version unless the reference narrows it.

        Raises NotFoundError with a did-you-mean, HubError for a digest prefix that fits several.
        """
        versions = self._versions(reference.name)
        if not versions:
            names = {expert.name for expert in self.experts()}
            raise NotFoundError(
                f"no registry knows an expert {reference.name!r}",
                did_you_mean(reference.name, names) or "run hub list",
            )
        if reference.version is not None:
            versions = [e for e in versions if e.version == reference.version]
        if reference.digest:
            versions = [e for e in versions if e.digest.startswith(reference.digest)]
            if len({e.digest for e in versions}) > 1:
                raise HubError(
                    f"{reference.text!r} is ambiguous: " + ", ".join(e.reference for e in versions),
                    "write more digits of the digest",
                )
        if not versions:
            known = ", ".join(e.reference for e in self._versions(reference.name))
            raise NotFoundError(f"there is no {reference.text}", f"known: {known}")
        return versions[-1]

    def has_base(self, name: str) -> bool:
        """Whether a base has this name, or is also known by it."""
        return any(name == known or name in entry.aka for known, entry in self.bases().items())

    def base(self, name: str) -> tuple[str, BaseEntry]:
        """A base by name or by one of the names it is also known as; NotFoundError otherwise."""
        bases = self.bases()
        if name in bases:
            return name, bases[name]
        for known, entry in bases.items():
            if name in entry.aka:
                return known, entry
        raise NotFoundError(
            f"no registry knows a base {name!r}",
            did_you_mean(name, bases)
            or "name a folder, hf:org/name, or a base of hub list --bases",
        )

    def base_folder_of(self, name: str) -> Path:
        """The folder that a base's relative sources are relative to."""
        return next(layer.folder for layer in self.layers if name in layer.content.bases)


def _read_layer(path: Path) -> Layer:
    return Layer(path, _yaml.validated(RegistryFile, _yaml.read(path)))


def absolute(expert: Expert, folder: Path) -> Expert:
    """The entry with its file sources made absolute."""
    sources = [
        f"file:{(folder / s.removeprefix('file:')).resolve()}" if s.startswith("file:") else s
        for s in expert.sources
    ]
    return expert.model_copy(update={"sources": sources})


def register(expert: Expert, file: Path | None = None) -> Path:
    """Write an entry into the user's registry, or into the file given; returns where.

    The same content again is a no-op; ConflictError when the name and version have other content.
    """
    path = file or hub_home() / "registry" / expert.name / f"{expert.version}.yaml"
    layer = _read_layer(path).content if path.is_file() else RegistryFile(version=1)
    for known in layer.experts:
        if (known.name, known.version) == (expert.name, expert.version):
            if known.digest != expert.digest:
                raise ConflictError(
                    f"{expert.reference} is {known.digest[:19]} already, "
                    f"and this is {expert.digest[:19]}",
                    f"give it a new version: --version {expert.version + 1}",
                )
            if known == expert:
                return path
    others = [e for e in layer.experts if e.reference != expert.reference]
    entries = sorted([*others, expert], key=lambda e: (e.name, e.version))
    record = RegistryFile(version=1, bases=layer.bases, experts=entries)
    write_text(path, _yaml.dump(record.model_dump(mode="json", exclude_unset=True)))
    return path


def next_version(name: str, experts: Iterable[Expert]) -> int:
    """One more than the newest version of the name; 1 for a new name."""
    return max((e.version for e in experts if e.name == name), default=0) + 1


def checked_name(name: str) -> str:
    """The name; UsageError when it is none."""
    if not re.fullmatch(NAME, name):
        raise UsageError(f"{name!r} is not a name", "use a-z, 0-9, '.', '_' and '-', at most 96")
    return name
