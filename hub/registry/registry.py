"""Registries, which map names to digests. They have layers, and the nearest layer wins."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.files.ownership import is_safe
from experthub.hub.files.spelling import suggest_name
from experthub.hub.formats.quantisation import find_original_name
from experthub.hub.registry.expert import Expert, Reference, find_origin, make_source_absolute
from experthub.hub.registry.layers import Layer, read_layer, read_user_layer, user_folder
from experthub.hub.registry.registry_file import BaseEntry


@dataclass(frozen=True)
class Registry:
    """Layers of registry files. The first layer that has a name decides what the name refers to.

    Args:
        layers: The layers, the nearest one first.

    Example:
        >>> from experthub.hub import Registry
        >>> names = [expert.name for expert in Registry.read().list_experts()]
    """

    layers: tuple[Layer, ...]

    @classmethod
    def read(cls, file: Path | None = None, without: Set[Path] = frozenset()) -> Registry:
        """Read all layers: `file`, the project's registry, the user's own and the starter registry.

        The project's registry is the nearest `registry.yaml` in the current folder or above it. It is
        omitted with a warning if it may be another user's, see `find_danger`.

        Args:
            file: A registry file that comes before all others.
            without: The paths of files in the user's own registry to skip.

        Returns:
            The registry.

        Raises:
            NotFoundError: `file` does not exist.
            UsageError: A layer is malformed.
        """
        if file is not None and not file.is_file():
            raise NotFoundError(f"there is no registry {file}", "name an existing registry.yaml")
        here = Path.cwd()
        near = (folder / "registry.yaml" for folder in (here, *here.parents))
        project = next((path for path in near if path.is_file()), None)
        named = file is not None and project is not None and file.resolve() == project.resolve()
        if project and not named and not is_safe(project, f"pass --registry {project}"):
            project = None
        starter = Path(__file__).parents[1] / "registry.yaml"
        before = {path.resolve(): path for path in (file, project) if path}
        layers = [read_layer(path) for path in before.values()]
        layers.append(read_user_layer(without))
        if starter.is_file() and starter.resolve() not in before:
            layers.append(read_layer(starter))
        return cls(tuple(layers))

    @property
    def user(self) -> Layer:
        """The layer of the user's own registry."""
        return next(layer for layer in self.layers if layer.folder == user_folder().resolve())

    def list_experts(self) -> list[Expert]:
        """List every expert that can be reached by a name and a version.

        Returns:
            The experts, sorted by name and version.
        """
        found: dict[tuple[str, int], Expert] = {}
        for layer in self.layers:
            for expert in layer.content.experts:
                found.setdefault((expert.name, expert.version), expert)
        return [found[key] for key in sorted(found)]

    def search(self, words: Iterable[str]) -> list[Expert]:
        """Find the experts in which every word occurs.

        A word may occur in the name, a tag, the task, the base, the kind or the description.

        Args:
            words: The words; case does not count.

        Returns:
            The experts, the best match first. A word in a name counts most, then a word in a tag or
            a task, then a word in another field.
        """
        wanted = [word.lower() for word in words]
        ranked = []
        for expert in self.list_experts():
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

    def list_bases(self) -> dict[str, BaseEntry]:
        """List every base.

        Returns:
            The bases by name, sorted.
        """
        merged: dict[str, BaseEntry] = {}
        for layer in reversed(self.layers):
            merged |= layer.content.bases
        return dict(sorted(merged.items()))

    def find_expert(self, reference: Reference) -> Expert:
        """Find the expert that a reference refers to.

        Args:
            reference: A reference by name. A bare name refers to the newest version in the nearest
                layer that has the name. `name@2` and `name@sha256:...` refer to the nearest entry
                that matches.

        Returns:
            The expert.

        Raises:
            NotFoundError: No layer has the name, the version or the digest.
            HubError: Several experts match the beginning of the digest.
        """
        layers = [layer.by_name.get(reference.name, []) for layer in self.layers]
        entries = [expert for known in layers for expert in known]
        if not entries:
            name = reference.name or reference.text
            close = suggest_name(name, {expert.name for expert in self.list_experts()})
            raise NotFoundError(
                f"no registry has an expert named {name!r}", close or "run hub list"
            )
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
            known = " or ".join(sorted({e.reference for e in entries}))
            raise NotFoundError(f"no registry has {reference.text}", f"use {known}")
        if reference.digest and len({e.digest for e in fitting}) > 1:
            raise HubError(
                f"{reference.text!r} matches several experts: "
                + ", ".join(e.reference for e in fitting),
                "write more digits of the digest",
            )
        return fitting[0]

    def has_base(self, name: str) -> bool:
        """Tell whether a base has this name or alias.

        Args:
            name: The name.

        Returns:
            Whether there is such a base.
        """
        return self._look_up_base(name) is not None

    def find_base(self, name: str) -> tuple[str, BaseEntry]:
        """Find a base by its name, or by one of its other names.

        Args:
            name: The name.

        Returns:
            The base's name in the registry, and its entry.

        Raises:
            NotFoundError: No layer has such a base.
        """
        if found := self._look_up_base(name):
            return found
        raise NotFoundError(
            f"no registry has a base named {name!r}",
            suggest_name(name, self.list_bases())
            or "name a folder, hf:org/name, or a base that hub list --bases shows",
        )

    def find_base_of_folder(self, name: str) -> str | None:
        """Find the base whose source is a model folder.

        Args:
            name: The path of the folder: absolute, or with `./` or `../` in front.

        Returns:
            The name of the nearest base that has the folder as a source; None if there is none.
        """
        if not name.startswith(("/", "./", "../")):
            return None
        folder = find_origin(f"file:{name}")
        for base, entry in self.list_bases().items():
            near = self.find_base_folder(base)
            for source in entry.sources:
                if (
                    source.startswith("file:")
                    and find_origin(make_source_absolute(source, near)) == folder
                ):
                    return base
        return None

    def find_original_base(self, name: str) -> str | None:
        """Find the base that a quantised copy was made from, by the copy's name.

        The name proves nothing. It is only a suggestion for adapters that name such a copy; their
        names and shapes are checked against the base.

        Args:
            name: The name of the copy, such as `unsloth/Llama-3.2-1B-bnb-4bit`.

        Returns:
            The name of a base that has the same name or alias without the owner, without `unsloth/`
            and without the ending that says how the copy is quantised; None if there is none.
        """
        mirror = name if name.startswith("unsloth/") else None
        original = find_original_name(name) or mirror
        if original is None:
            return None
        wanted = original.rpartition("/")[2].lower()
        for base, entry in self.list_bases().items():
            if wanted in {known.rpartition("/")[2].lower() for known in (base, *entry.aka)}:
                return base
        return None

    def _look_up_base(self, name: str) -> tuple[str, BaseEntry] | None:
        """Return the base with this name, or else with this alias, or None."""
        bases = self.list_bases()
        names = [name] if name in bases else [k for k, entry in bases.items() if name in entry.aka]
        return (names[0], bases[names[0]]) if names else None

    def find_base_folder(self, name: str) -> Path:
        """Find the folder that the relative sources of a base start from.

        Args:
            name: The base's name in the registry.

        Returns:
            The folder of the nearest layer that has the base.
        """
        return next(layer.folder for layer in self.layers if name in layer.content.bases)
