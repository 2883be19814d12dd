"""Experts as records: what a registry says of one, and what its content is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import UsageError
from experthub.hub.files.atomic import digest_of
from experthub.hub.files.yaml_files import Closed
from pydantic import Field, StringConstraints

NAME = r"[a-z0-9][a-z0-9._-]{0,95}"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
FILE = r"[a-z_]{1,60}(-[0-9]{5}-of-[0-9]{5})?\.(json|safetensors|safetensors\.index\.json)"
FileName = Annotated[str, StringConstraints(pattern=f"^{FILE}$")]
Kind = Literal["lora", "task_vector", "skills", "coefficients", "router"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
TASK_VECTOR = "task_vector.safetensors"
SHARD = "task_vector-{:05d}-of-{:05d}.safetensors"
SHARD_INDEX = "task_vector.safetensors.index.json"
GATES = "phatgoose_gates.safetensors"
COEFFICIENTS = "coefficients.safetensors"
COEFFICIENTS_JSON = "coefficients.json"
SKILLS = "skills.safetensors"
SKILLS_JSON = "skills.json"
ROUTER = "router.safetensors"
ROUTER_JSON = "router.json"
DESCRIPTION = "expert.json"
NUMBER = "[0-9]" * 5
EXPERT_FILES = (
    ADAPTER_CONFIG,
    ADAPTER,
    TASK_VECTOR,
    f"task_vector-{NUMBER}-of-{NUMBER}.safetensors",
    SHARD_INDEX,
    GATES,
    COEFFICIENTS,
    COEFFICIENTS_JSON,
    SKILLS,
    SKILLS_JSON,
    ROUTER,
    ROUTER_JSON,
    DESCRIPTION,
)


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns of file names matches, as in a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class Score(Closed):
    """How the expert and its base did on one split of one task."""

    task: str
    split: str
    metric: str
    n: int
    base: float
    expert: float
    delta_ci95: tuple[float, float] | None = Field(default=None, strict=False)


class Expert(Closed):
    """A registry's entry: a name for a digest, where to get it, and its description."""

    name: Name
    version: Annotated[int, Field(ge=1, lt=10**9)] = 1
    kind: Kind = "lora"
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
        return f"{self.name}@{self.version}"


class FileInfo(Closed):
    """One file of an expert, by content."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class Identity(Closed):
    """What an expert is, whatever it is called: the digest of this record names it."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    kind: Kind
    base_fingerprint: Digest | None
    files: dict[FileName, FileInfo]

    def record(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    @property
    def digest(self) -> str:
        return digest_of(self.record())

    @property
    def weights(self) -> list[str]:
        """The files that hold the change of the weights."""
        names = (n for n in self.files if n.endswith(".safetensors") and n != GATES)
        return sorted(names)

    @property
    def objects(self) -> set[str]:
        """The sha256 of everything that the store has of it, this record included."""
        return {self.digest.removeprefix("sha256:"), *(f.sha256 for f in self.files.values())}


@dataclass(frozen=True)
class Reference:
    """A parsed reference to an expert or base: a name, or a folder, or a remote place.

    Exactly one of name, folder and remote is set; version and digest narrow a name.  member: the
    `name@version` that is meant of the experts in a shared folder or archive.
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

        folder: what relative paths are relative to; the current one by default.
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
    """A source as it means the same from everywhere; folder: what it is relative to."""
    reference = Reference.parse(source, folder)
    return _written(reference.folder.resolve(), reference) if reference.folder else source


def relative_source(source: str, folder: Path) -> str:
    """A source as it is written into a file of a folder: relative to it for what lies inside."""
    reference, near = Reference.parse(source), folder.resolve()
    place = reference.folder and reference.folder.resolve()
    inside = place is not None and place.is_relative_to(near)
    return _written(place.relative_to(near), reference) if place and inside else source


def _written(place: Path, reference: Reference) -> str:
    return f"file:{place}" + (f"#{reference.member}" if reference.member else "")
