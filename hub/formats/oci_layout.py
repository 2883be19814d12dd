"""Shared folders and archives of experts: OCI image layouts, with blobs by digest.

OCI Image Layout 1.0: https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from experthub.hub.errors import IntegrityError, NotFoundError, UsageError
from experthub.hub.files.atomic import open_atomically
from experthub.hub.files.patterns import is_named
from experthub.hub.files.spelling import suggest_name
from experthub.hub.formats import tar
from experthub.hub.formats.records import Digest
from experthub.hub.registry.expert import NAME, list_file_patterns
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MARK, INDEX = "oci-layout", "index.json"
REFERENCE = "org.opencontainers.image.ref.name"
FILE_NAME = "org.cncf.model.filepath"
EXPERT_DIGEST = "dev.experthub.expert.digest"
MAX_JSON = 8 << 20
CHUNK = 1 << 20
HINT = "get it again, or write it again with hub push or hub export"


class Record(BaseModel):
    """A record of the OCI formats, which anybody may extend: unknown keys are left alone."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class Descriptor(Record):
    """A blob, by content."""

    mediaType: str
    digest: Digest
    size: Annotated[int, Field(ge=0)]
    annotations: dict[str, str] = {}


class Index(Record):
    """index.json."""

    schemaVersion: Literal[2]
    manifests: list[Descriptor]


class Manifest(Record):
    """What one expert consists of."""

    schemaVersion: Literal[2]
    config: Descriptor
    layers: list[Descriptor]


Known = TypeVar("Known", bound=Record)


@dataclass(frozen=True)
class Section:
    """Some bytes of a file."""

    path: Path
    offset: int
    size: int


def is_layout(place: Path) -> bool:
    """Whether a place holds experts by digest: a file, or a folder with the mark of a layout."""
    return place.is_file() or (place / MARK).is_file()


@dataclass(frozen=True)
class OciLayout:
    """A shared folder or archive: its files by name, and what its index lists."""

    place: Path
    files: Mapping[str, Section]
    entries: Sequence[Descriptor]

    @classmethod
    def read(cls, place: Path) -> OciLayout:
        """Read the index; IntegrityError for one that is damaged."""
        if place.is_file():
            files = {n: Section(place, at, size) for n, (at, size) in tar.list_members(place).items()}
        else:
            blobs = (place / "blobs" / "sha256").glob("[0-9a-f]*")
            found = [p for p in (place / INDEX, *blobs) if p.is_file() and not p.is_symlink()]
            files = {
                str(p.relative_to(place)): Section(p, 0, p.stat().st_size) for p in sorted(found)
            }
        return cls(place, files, cls(place, files, ())._read_record(Index, INDEX).manifests)

    @property
    def experts(self) -> dict[str, Descriptor]:
        """The experts, by `name@version`; images of anything else are left out."""
        found = {e.annotations.get(REFERENCE, ""): e for e in self.entries}
        return {
            name: entry
            for name, entry in found.items()
            if EXPERT_DIGEST in entry.annotations and re.fullmatch(rf"{NAME}@\d+", name)
        }

    def find(self, member: str) -> str:
        """The `name@version` that is meant; with no name, the only one there is."""
        if member in self.experts:
            return member
        if not member and len(self.experts) == 1:
            return next(iter(self.experts))
        known = ", ".join(sorted(self.experts)) or "none"
        if not member:
            raise UsageError(
                f"{self.place} holds {len(self.experts)} experts: {known}",
                f"name one: file:{self.place}#name@version",
            )
        raise NotFoundError(
            f"{self.place} has no {member}", suggest_name(member, self.experts) or f"known: {known}"
        )

    def unpack(self, reference: str, folder: Path) -> dict[str, str]:
        """Write one expert's files into a folder, each checked; files of other names are left out.

        Returns their sha256.
        """
        manifest = self._read_record(Manifest, _blob_path(self.experts[reference]), self.experts[reference])
        named: dict[str, Descriptor] = {}
        wanted = list_file_patterns()
        for layer in manifest.layers:
            name = layer.annotations.get(FILE_NAME, "")
            if name in named:
                raise IntegrityError(f"{self.place}: {reference} has two files {name!r}", HINT)
            if is_named(name, wanted):
                named[name] = layer
        for name, layer in named.items():
            with open_atomically(folder / name) as file:
                for chunk in self._read_chunks(layer):
                    file.write(chunk)
        return {name: layer.digest.removeprefix("sha256:") for name, layer in named.items()}

    def _read_chunks(self, wanted: Descriptor) -> Iterator[bytes]:
        """The bytes of a blob; IntegrityError, at the end, when they are not those of its digest."""
        section = self._find_section(_blob_path(wanted))
        digest, left = hashlib.sha256(), section.size
        with section.path.open("rb") as file:
            file.seek(section.offset)
            while left and (chunk := file.read(min(left, CHUNK))):
                left -= len(chunk)
                digest.update(chunk)
                yield chunk
        if section.size != wanted.size or f"sha256:{digest.hexdigest()}" != wanted.digest:
            raise IntegrityError(f"{self.place}: blob {wanted.digest[7:19]} is damaged", HINT)

    def _find_section(self, name: str) -> Section:
        if name not in self.files:
            raise IntegrityError(f"{self.place} has no {name}", HINT)
        return self.files[name]

    def _read_record(self, kind: type[Known], name: str, wanted: Descriptor | None = None) -> Known:
        """A JSON file as what it is to be."""
        section = self._find_section(name)
        if section.size > MAX_JSON:
            raise IntegrityError(f"{self.place}: {name} has {section.size} bytes", HINT)
        if wanted is None:
            with section.path.open("rb") as file:
                file.seek(section.offset)
                text = file.read(section.size)
        else:
            text = b"".join(self._read_chunks(wanted))
        try:
            return kind.model_validate_json(text)
        except (ValidationError, RecursionError) as error:
            fact = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "too deep"
            raise IntegrityError(f"{self.place}: {name} is damaged: {fact}", HINT) from None


def _blob_path(descriptor: Descriptor) -> str:
    return "blobs/" + descriptor.digest.replace(":", "/")
