"""Registries: names for digests, in layers of which the nearest wins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from experthub.hub.errors import ConflictError, HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files import checksummed_text, yaml_files
from experthub.hub.files.atomic import hub_home, listing, locked, write_text
from experthub.hub.files.yaml_files import Closed, did_you_mean
from experthub.hub.registry.expert import NAME, Digest, Expert, Reference, absolute_source
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

    @cached_property
    def by_name(self) -> dict[str, list[Expert]]:
        """All versions of each expert, in their order."""
        found: dict[str, list[Expert]] = {}
        for expert in self.content.experts:
            found.setdefault(expert.name, []).append(expert)
        return found


@dataclass(frozen=True)
class Registry:
    """Layers of registries, nearest first: the first that knows a name wins."""

    layers: tuple[Layer, ...]

    @classmethod
    def read(cls, file: Path | None = None, without: Set[Path] = frozenset()) -> Registry:
        """The file given, the project's, the user's own, and the starter registry.

        file: a registry to look in before all others.  without: files of the user's own that are
        left out.  Raises UsageError for a malformed layer, NotFoundError for a missing file.
        """
        if file is not None and not file.is_file():
            raise NotFoundError(f"there is no registry {file}", "name a registry.yaml")
        here = Path.cwd()
        near = (folder / "registry.yaml" for folder in (here, *here.parents))
        project = next((path for path in near if path.is_file()), None)
        starter = Path(__file__).parents[1] / "registry.yaml"
        before = {path.resolve(): path for path in (file, project) if path}
        layers = [_read_layer(path) for path in before.values()]
        layers.append(_user_layer(without))
        if starter.is_file() and starter.resolve() not in before:
            layers.append(_read_layer(starter))
        return cls(tuple(layers))

    @property
    def user(self) -> Layer:
        """The user's own layer."""
        return next(layer for layer in self.layers if layer.folder == _user_folder().resolve())

    def experts(self) -> list[Expert]:
        """Every expert that a name and a version can reach."""
        found: dict[tuple[str, int], Expert] = {}
        for layer in self.layers:
            for expert in layer.content.experts:
                found.setdefault((expert.name, expert.version), expert)
        return [found[key] for key in sorted(found)]

    def search(self, words: Iterable[str]) -> list[Expert]:
        """The experts that have every word in a name, tag, task, base or description, best first.

        A word in a name counts most, then one in a tag or task, then one elsewhere.
        """
        wanted = [word.lower() for word in words]
        ranked = []
        for expert in self.experts():
            fields = (
                expert.name,
                " ".join([*expert.tags, expert.task or ""]),
                f"{expert.description} {expert.base} {expert.kind}",
            )
            texts = [text.lower() for text in fields]
            places = [next((i for i, t in enumerate(texts) if word in t), None) for word in wanted]
            if None not in places:
                ranked.append((sum(place or 0 for place in places), expert))
        return [e for _, e in sorted(ranked, key=lambda r: (r[0], r[1].name, -r[1].version))]

    def bases(self) -> dict[str, BaseEntry]:
        """Every base, by name."""
        merged: dict[str, BaseEntry] = {}
        for layer in reversed(self.layers):
            merged |= layer.content.bases
        return dict(sorted(merged.items()))

    def expert(self, reference: Reference) -> Expert:
        """The expert that a reference means.

        A bare name means the newest version in the nearest layer that knows it; `name@2` and
        `name@sha256:...` mean the nearest entry that fits.  Raises NotFoundError with a
        did-you-mean, HubError for a digest prefix that fits several.
        """
        layers = [layer.by_name.get(reference.name, []) for layer in self.layers]
        entries = [expert for known in layers for expert in known]
        if not entries:
            name = reference.name or reference.text
            close = did_you_mean(name, {expert.name for expert in self.experts()})
            raise NotFoundError(f"no registry knows an expert {name!r}", close or "run hub list")
        if reference.version is None and not reference.digest:
            nearest = next(known for known in layers if known)
            return max(nearest, key=lambda e: e.version)
        fitting = [
            e
            for e in entries
            if e.version == reference.version
            or (reference.digest and e.digest.startswith(reference.digest))
        ]
        if not fitting:
            known = ", ".join(sorted({e.reference for e in entries}))
            raise NotFoundError(f"there is no {reference.text}", f"known: {known}")
        if reference.digest and len({e.digest for e in fitting}) > 1:
            raise HubError(
                f"{reference.text!r} is ambiguous: " + ", ".join(e.reference for e in fitting),
                "write more digits of the digest",
            )
        return fitting[0]

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
    """A registry file, its experts' relative sources made absolute."""
    layer = Layer(path, _read_file(path))
    experts = [_absolute(expert, layer.folder) for expert in layer.content.experts]
    return Layer(path, layer.content.model_copy(update={"experts": experts}))


def _read_file(path: Path) -> RegistryFile:
    return yaml_files.validated(RegistryFile, yaml_files.read(path), "docs/registry.md")


def _user_folder() -> Path:
    return hub_home() / "registry"


def _user_layer(without: Set[Path]) -> Layer:
    """The user's own registry, one small file per expert and version, as one layer."""
    folder = _user_folder()
    experts: list[Expert] = []
    for path in entry_files(folder):
        if path not in without:
            with suppress(FileNotFoundError):  # removed at this moment
                experts += _read_layer(path).content.experts
    return Layer(folder / "registry.yaml", RegistryFile(version=1, experts=experts))


def entry_files(folder: Path) -> list[Path]:
    """The entries of the user's own registry, which may come and go meanwhile."""
    return [path for name in listing(folder) for path in listing(name) if path.suffix == ".yaml"]


def _absolute(expert: Expert, folder: Path) -> Expert:
    return expert.model_copy(
        update={"sources": [absolute_source(source, folder) for source in expert.sources]}
    )


def entry_path(expert: Expert) -> Path:
    """Where the user's own registry has an expert's entry."""
    return _user_folder() / expert.name / f"{expert.version}.yaml"


def _changing() -> AbstractContextManager[None]:
    """One process at a time changes registries."""
    return locked(hub_home() / "locks" / "registry")


def register(expert: Expert, file: Path | None = None) -> Path:
    """Write an entry into the user's registry, or into the file given; returns where.

    The same content again is a no-op; ConflictError when the name and version have other content.
    """
    path = file or entry_path(expert)
    with _changing():
        return _register(expert, path, checksummed_text.write if file is None else write_text)


def _register(expert: Expert, path: Path, write: Callable[[Path, str], None]) -> Path:
    layer = _read_file(path) if path.is_file() else RegistryFile(version=1)
    for known in layer.experts:
        if known.reference == expert.reference:
            check_same_content(known, expert)
            if known == expert:
                return path
    others = [e for e in layer.experts if e.reference != expert.reference]
    entries = sorted([*others, expert], key=lambda e: (e.name, e.version))
    write(path, _text(RegistryFile(version=1, bases=layer.bases, experts=entries), path))
    return path


def with_source(expert: Expert, source: str) -> Expert:
    """Note in the user's own registry where an expert can be had too."""
    known = expert.model_copy(update={"sources": list(dict.fromkeys([*expert.sources, source]))})
    register(known)
    return known


def remove(experts: Sequence[Expert]) -> None:
    """Take experts out of the user's own registry; their content stays until it is collected."""
    with _changing():
        for expert in experts:
            path = entry_path(expert)
            if path.is_file() and expert.digest in {e.digest for e in _read_file(path).experts}:
                path.unlink()
            with suppress(OSError):
                path.parent.rmdir()


def check_writable(expert: Expert) -> None:
    """Raise IntegrityError for an entry that no registry could be read with any more."""
    try:
        _text(RegistryFile(version=1, experts=[expert]), entry_path(expert))
    except UsageError as error:
        raise IntegrityError(
            f"the description of {expert.name}: {error.message}", error.hint
        ) from None


def _text(record: RegistryFile, path: Path) -> str:
    """A registry's file, which can be read back; UsageError for what is too long or too deep."""
    try:
        text = yaml_files.dump(record.model_dump(mode="json", exclude_unset=True))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be written: {error}", "shorten the entry") from None
    if len(text.encode()) > yaml_files.MAX_BYTES:
        raise UsageError(
            f"{path} would have more than {yaml_files.MAX_BYTES} bytes",
            "shorten its descriptions, or use another file",
        )
    yaml_files.validated(RegistryFile, yaml_files.parse(text, str(path)))
    return text


def check_same_content(known: Expert, expert: Expert) -> None:
    """Raise ConflictError when a name and version stand for two contents."""
    if known.digest != expert.digest:
        raise ConflictError(
            f"{expert.reference} is {known.digest[:19]} already, and this is {expert.digest[:19]}",
            f"give it a new version: --version {expert.version + 1}",
        )


def next_version(name: str, experts: Iterable[Expert]) -> int:
    """One more than the newest version of the name; 1 for a new name."""
    return max((e.version for e in experts if e.name == name), default=0) + 1


def checked_name(name: str) -> str:
    """The name; UsageError when it is none."""
    if not re.fullmatch(NAME, name):
        raise UsageError(f"{name!r} is not a name", "use a-z, 0-9, '.', '_' and '-', at most 96")
    return name
