"""The records of experts: a registry's entry, the identity of the content, and references."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal

from experthub.hub.errors import UsageError
from experthub.hub.files.digests import digest_of
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Digest
from experthub.hub.kinds import kinds
from experthub.hub.kinds.kind import FILE
from experthub.hub.kinds.lora import GATES
from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

NAME = r"[a-z0-9][a-z0-9._-]{0,95}"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
FileName = Annotated[str, StringConstraints(pattern=f"^{FILE}$")]
DESCRIPTION = "expert.json"


def _known_kind(name: str) -> str:
    """Return the name of a kind that is registered, and refuse any other."""
    if name not in kinds:
        context = {"name": short(name), "known": ", ".join(kinds)}
        raise PydanticCustomError("unknown_kind", "unknown kind {name}, known: {known}", context)
    return name


KindName = Annotated[str, AfterValidator(_known_kind)]


def expert_files() -> tuple[str, ...]:
    """List the names of the files that an expert of any kind may have.

    Returns:
        Shell patterns. Folders that were fetched from a model hub are named after a hash of them
        in this order, so it stays as it is.
    """
    changes = [name for kind in kinds.values() if kind.load for name in kind.files]
    others = [name for kind in kinds.values() if not kind.load for name in kind.files]
    return (*changes, GATES, *others, DESCRIPTION)


class Score(Closed):
    """The scores of an expert and of its base on one split of one task."""

    task: str
    split: str
    metric: str
    n: int
    base: float
    expert: float
    delta_ci95: tuple[float, float] | None = Field(default=None, strict=False)


class Expert(Closed):
    """A registry's entry: a name for a digest, the sources of the content, and a description."""

    name: Name
    version: Annotated[int, Field(ge=1, lt=10**9)] = 1
    kind: KindName = "lora"
    base: str
    sources: Annotated[list[str], Field(min_length=1)]
    digest: Digest
    task: str | None = None
    license: str | None = None
    description: str = ""
    tags: list[str] = []
    training: dict[str, Any] = {}
    scores: list[Score] = []

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class FileInfo(Closed):
    """The digest and the size of one file of an expert."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class Identity(Closed):
    """The identity of an expert's content; the digest of this record is the expert's digest."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    kind: KindName
    base_fingerprint: Digest | None
    files: dict[FileName, FileInfo]

    def record(self) -> dict[str, Any]:
        """Return the record as plain values.

        Returns:
            The values, by key.
        """
        return self.model_dump(mode="json", by_alias=True)

    @property
    def digest(self) -> str:
        """`sha256:` and the SHA-256 of the record."""
        return digest_of(self.record())

    @property
    def objects(self) -> set[str]:
        """The sha256 of every object that the store keeps for it, this record included."""
        return {self.digest.removeprefix("sha256:"), *(f.sha256 for f in self.files.values())}


@dataclass(frozen=True)
class Reference:
    """A parsed reference to an expert or a base. Exactly one of name, folder and remote is set.

    Args:
        text: The reference as it was written.
        name: A name that a registry knows.
        version: The version of the name.
        digest: The digest that the name means, or the beginning of it.
        folder: A folder, or a file that holds experts.
        remote: A remote source.
        member: The `name@version` of one expert in a shared folder or archive.
    """

    text: str
    name: str = ""
    version: int | None = None
    digest: str = ""
    folder: Path | None = None
    remote: str = ""
    member: str = ""

    @classmethod
    def parse(cls, text: str, folder: Path | None = None) -> Reference:
        """Read `name`, `name@2`, `name@sha256:...`, `./x`, `/x`, `../x`, `file:DIR`, `hf:...`, ...

        Args:
            text: The reference.
            folder: What relative paths are relative to. The default is the current folder.

        Returns:
            The parsed reference.

        Raises:
            UsageError: The text is not a reference.
        """
        if "\0" in text:
            raise UsageError(f"{text[:200]!r} is not a reference", "no file has such a name")
        if text.startswith(("./", "../", "/")) or text in (".", ".."):
            return cls(text, folder=(folder or Path.cwd()) / text)
        if text.startswith("file:"):
            place = text.removeprefix("file:")
            found = re.search(rf"#({NAME}@\d+)$", place)
            member = found.group(1) if found else ""
            place = place.removesuffix(f"#{member}")
            return cls(text, folder=(folder or Path.cwd()) / place, member=member)
        if re.match(r"(hf|pypi|s3|oci):", text):
            return cls(text, remote=text)
        found = re.fullmatch(rf"({NAME})(?:@(?:([0-9]{{1,9}})|(sha256:[0-9a-f]{{8,64}})))?", text)
        if not found:
            raise UsageError(
                f"{text[:200]!r} is not a reference",
                "write name, name@2, name@sha256:<8 or more digits>, ./folder or hf:org/name",
            )
        name, version, digest = found.groups()
        return cls(text, name, int(version) if version else None, digest or "")


def absolute_source(source: str, folder: Path) -> str:
    """Make a source absolute, so that it means the same from every folder.

    Args:
        source: The source.
        folder: The folder that it is relative to.

    Returns:
        The absolute source; remote sources and names stay as they are.

    Raises:
        UsageError: The source is not a reference.
    """
    reference = Reference.parse(source, folder)
    return _written(reference.folder.resolve(), reference) if reference.folder else source


def relative_source(source: str, folder: Path) -> str:
    """Make a source relative to a folder, if it is inside it, for a file in that folder.

    Args:
        source: The source.
        folder: The folder.

    Returns:
        The relative source, or the source itself if it is elsewhere.

    Raises:
        UsageError: The source is not a reference.
    """
    reference, near = Reference.parse(source), folder.resolve()
    place = reference.folder and reference.folder.resolve()
    inside = place is not None and place.is_relative_to(near)
    return _written(place.relative_to(near), reference) if place and inside else source


def _written(place: Path, reference: Reference) -> str:
    """Return a folder as a source, with the member that the reference names."""
    return f"file:{place}" + (f"#{reference.member}" if reference.member else "")
