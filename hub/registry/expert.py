"""Records of experts: registry entries, the identity of content, and parsed references."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal

from experthub.hub.errors import UsageError
from experthub.hub.files.digests import digest_of, find_not_finite, replace_not_finite
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Digest, Sha256
from experthub.hub.kinds import kinds
from experthub.hub.kinds.kind import FILE
from experthub.hub.registry.proof_record import Proof
from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_serializer
from pydantic_core import PydanticCustomError

NAME = r"[a-z0-9][a-z0-9._-]{0,95}"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
FileName = Annotated[str, StringConstraints(pattern=f"^{FILE}$")]
DESCRIPTION = "expert.json"


def _check_kind(name: str) -> str:
    """Return the name of a registered kind; reject any other name."""
    if name not in kinds:
        context = {"name": short(name), "known": ", ".join(kinds)}
        raise PydanticCustomError(
            "unknown_kind",
            "unknown kind {name}; known kinds: {known}; install the package that adds this kind",
            context,
        )
    return name


KindName = Annotated[str, AfterValidator(_check_kind)]
# An entry may be of a kind whose package is absent here: it must not block the other entries.
StatedKind = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]{0,59}$")]


class Score(Closed):
    """The scores of an expert and of its base on one split of a task.

    Args:
        task: The task.
        split: The split of the task.
        metric: The metric of the scores.
        n: The number of examples.
        base: The score of the base.
        expert: The score of the expert.
        delta_ci95: The 95 % confidence interval of the difference between the two scores.
    """

    task: str
    split: str
    metric: str
    n: int
    base: float
    expert: float
    delta_ci95: tuple[float, float] | None = Field(default=None, strict=False)


class Expert(Closed):
    """A registry entry: it maps a name and a version to a digest, and says where the content is.

    Args:
        name: The name of the expert.
        version: The version of the name, at least 1.
        kind: The kind of expert, such as `lora`.
        base: The name of the base that the expert was trained on.
        sources: The sources of the content, in the order in which they are tried.
        digest: The digest of the content: `sha256:` and 64 hexadecimal digits.
        task: The task that the expert was trained on.
        license: The licence of the expert.
        description: One line about the expert.
        tags: Words to search for.
        training: The settings and results of the training.
        scores: The scores on tasks.
        made_from: The format, the type and the sha256 of the adapter that was converted into the
            expert, and the error of the conversion. Empty if nothing was converted.
        proof: The comparison with the expert's own library, if it was made here.

    Example:
        >>> from experthub.hub import Expert
        >>> digest = "sha256:" + "0" * 64
        >>> Expert(name="mine", base="tiny", sources=["./mine"], digest=digest).reference
        'mine@1'
    """

    name: Name
    version: Annotated[int, Field(ge=1, lt=10**9)] = 1
    kind: StatedKind = "lora"
    base: str
    sources: Annotated[list[str], Field(min_length=1)]
    digest: Digest
    task: str | None = None
    license: str | None = None
    description: str = ""
    tags: list[str] = []
    training: dict[str, Any] = {}
    scores: list[Score] = []
    made_from: dict[str, Any] = {}
    proof: Proof | None = None

    @field_validator("scores")
    @classmethod
    def _keep_numbers(cls, scores: list[Score]) -> list[Score]:
        """Drop scores that are NaN or infinite: they say nothing, and JSON cannot hold them."""
        return [s for s in scores if not any(find_not_finite(s.model_dump()))]

    @field_validator("training")
    @classmethod
    def _keep_plain(cls, training: dict[str, Any]) -> dict[str, Any]:
        """Replace NaN and infinity in the results of a training by None."""
        found: dict[str, Any] = replace_not_finite(training)
        return found

    @model_serializer(mode="wrap")
    def _omit_unset(self, serialize: Any) -> dict[str, Any]:
        """Leave out empty fields that entries of earlier versions do not have."""
        record: dict[str, Any] = serialize(self)
        return {k: v for k, v in record.items() if v or k not in ("made_from", "proof")}

    @property
    def reference(self) -> str:
        """The reference of this version: `name@version`."""
        return f"{self.name}@{self.version}"


class FileInfo(Closed):
    """The checksum and the size of one file of an expert.

    Args:
        sha256: The sha256 of the file as 64 hexadecimal digits.
        size: The size in bytes.
    """

    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class Identity(Closed):
    """The identity of an expert's content. The digest of this record is the expert's digest.

    Args:
        schema_: The version of the record, written as `schema`.
        kind: The kind of expert.
        base_fingerprint: The fingerprint of the base, or None if it is unknown.
        files: The files by name.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    kind: KindName
    base_fingerprint: Digest | None
    files: dict[FileName, FileInfo]

    def record(self) -> dict[str, Any]:
        """Return the record as plain values.

        Returns:
            The values by key, as in `expert.json`.
        """
        return self.model_dump(mode="json", by_alias=True)

    @property
    def digest(self) -> str:
        """The digest of the expert: `sha256:` and the sha256 of this record as canonical JSON."""
        return digest_of(self.record())

    @property
    def objects(self) -> set[str]:
        """The sha256 of every object that the store keeps for the expert, including this record."""
        return {self.digest.removeprefix("sha256:"), *(f.sha256 for f in self.files.values())}


@dataclass(frozen=True)
class Reference:
    """A parsed reference to an expert or a base. Exactly one of name, folder and remote is set.

    Args:
        text: The reference as the user wrote it.
        name: A name in a registry.
        version: The version of the name.
        digest: The digest that the name refers to, or the first characters of it.
        folder: The path of an expert's folder, of a shared folder, or of an archive.
        remote: A remote source, such as `hf:org/name`.
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
        """Parse a reference.

        Args:
            text: The reference: `name`, `name@2`, `name@sha256:...`, `./x`, `/x`, `file:PLACE`,
                `file:PLACE#name@2`, or a remote source such as `hf:org/name`.
            folder: The folder that relative paths start from. The default is the current folder.

        Returns:
            The parsed reference.

        Raises:
            UsageError: The text is not a reference.
        """
        if "\0" in text:
            raise UsageError(f"{text[:200]!r} is not a reference", "remove the NUL characters")
        # Python reads names of files that are not UTF-8 as U+DC80 to U+DCFF.
        if re.search(r"[\ud800-\udc7f\udd00-\udfff]", text):
            raise UsageError(
                f"{text[:200]!r} is not a reference", "write it as text: it has half a character"
            )
        if text.startswith(("./", "../", "/")) or text in (".", ".."):
            return cls(text, folder=(folder or Path.cwd()) / text)
        if text.startswith("file:"):
            place = text.removeprefix("file:")
            found = re.search(rf"#({NAME}@\d+)$", place)
            member = found.group(1) if found else ""
            place = place.removesuffix(f"#{member}")
            return cls(text, folder=(folder or Path.cwd()) / place, member=member)
        if re.match(r"(hf|pypi|s3|oci|ollama):", text):
            return cls(text, remote=text)
        found = re.fullmatch(rf"({NAME})(?:@(?:([0-9]{{1,9}})|(sha256:[0-9a-f]{{8,64}})))?", text)
        if not found:
            raise UsageError(
                f"{text[:200]!r} is not a reference",
                "write name, name@2, name@sha256:<at least 8 digits>, ./folder or hf:org/name",
            )
        name, version, digest = found.groups()
        return cls(text, name, int(version) if version else None, digest or "")


def find_origin(source: str) -> str:
    """Find the place that a source belongs to.

    Args:
        source: The source.

    Returns:
        The source without the revision of a repository, or the expert of a shared folder.
    """
    if source.startswith("file:"):
        reference = Reference.parse(source)
        return str(reference.folder and reference.folder.resolve())
    return source.partition("@")[0]


def make_source_absolute(source: str, folder: Path) -> str:
    """Make a source absolute, so that it refers to the same place from every folder.

    Args:
        source: The source.
        folder: The folder that a relative source starts from.

    Returns:
        The absolute source. Remote sources and names are returned unchanged.

    Raises:
        UsageError: The source is not a reference.
    """
    reference = Reference.parse(source, folder)
    return _format_source(reference.folder.resolve(), reference) if reference.folder else source


def make_source_relative(source: str, folder: Path) -> str:
    """Make a source relative to a folder that contains it, for a file in that folder.

    Args:
        source: The source.
        folder: The folder.

    Returns:
        The relative source. A source outside of the folder is returned unchanged.

    Raises:
        UsageError: The source is not a reference.
    """
    reference, near = Reference.parse(source), folder.resolve()
    place = reference.folder and reference.folder.resolve()
    inside = place is not None and place.is_relative_to(near)
    return _format_source(place.relative_to(near), reference) if place and inside else source


def _format_source(place: Path, reference: Reference) -> str:
    """Write a path as a source, with the member that the reference names."""
    return f"file:{place}" + (f"#{reference.member}" if reference.member else "")
