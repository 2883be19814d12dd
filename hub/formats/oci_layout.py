"""OCI image layouts: shared folders and archives of experts, with blobs by digest.

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
from experthub.hub.files.digests import read_chunks
from experthub.hub.files.patterns import matches_any
from experthub.hub.files.spelling import suggest_name
from experthub.hub.formats import tar
from experthub.hub.formats.records import Digest
from experthub.hub.registry.expert import NAME
from experthub.hub.registry.file_patterns import list_fetched_files
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MARK, INDEX = "oci-layout", "index.json"
REFERENCE = "org.opencontainers.image.ref.name"
FILE_NAME = "org.cncf.model.filepath"
EXPERT_DIGEST = "dev.experthub.expert.digest"
MAX_JSON = 8 << 20
HINT = "get the folder or archive again, or write it again with hub push or hub export"


class Record(BaseModel):
    """A record of the OCI formats. Anybody may extend them, so unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class Descriptor(Record):
    """A reference to a blob.

    Args:
        mediaType: The media type.
        digest: The digest of the blob.
        size: The size in bytes.
        annotations: Texts by key.
    """

    mediaType: str
    digest: Digest
    size: Annotated[int, Field(ge=0)]
    annotations: dict[str, str] = {}


class Index(Record):
    """The content of `index.json`.

    Args:
        schemaVersion: The version of the format.
        manifests: The manifests of all images.
    """

    schemaVersion: Literal[2]
    manifests: list[Descriptor]


class Manifest(Record):
    """The manifest of one image.

    Args:
        schemaVersion: The version of the format.
        config: The configuration of the image.
        layers: The files of the image.
    """

    schemaVersion: Literal[2]
    config: Descriptor
    layers: list[Descriptor]


Known = TypeVar("Known", bound=Record)


@dataclass(frozen=True)
class Section:
    """A part of a file.

    Args:
        path: The path of the file.
        offset: The first byte.
        size: The number of bytes.
    """

    path: Path
    offset: int
    size: int


def is_layout(place: Path) -> bool:
    """Tell whether a path is a shared folder or an archive.

    Args:
        place: The path.

    Returns:
        True for a file, and for a folder with the mark of a layout.
    """
    return place.is_file() or (place / MARK).is_file()


@dataclass(frozen=True)
class OciLayout:
    """A shared folder or archive.

    Args:
        place: The path of the folder or the archive.
        files: The files by name, with their places.
        entries: The images that the index lists.
    """

    place: Path
    files: Mapping[str, Section]
    entries: Sequence[Descriptor]

    @classmethod
    def read(cls, place: Path) -> OciLayout:
        """Read the index of a shared folder or archive.

        Args:
            place: The path.

        Returns:
            The layout.

        Raises:
            IntegrityError: The index or the archive is damaged.
        """
        if place.is_file():
            files = {
                n: Section(place, at, size) for n, (at, size) in tar.list_members(place).items()
            }
        else:
            blobs = (place / "blobs" / "sha256").glob("[0-9a-f]*")
            found = [p for p in (place / INDEX, *blobs) if p.is_file() and not p.is_symlink()]
            files = {
                str(p.relative_to(place)): Section(p, 0, p.stat().st_size) for p in sorted(found)
            }
        return cls(place, files, cls(place, files, ())._read_record(Index, INDEX).manifests)

    @property
    def experts(self) -> dict[str, Descriptor]:
        """The entries of the experts by `name@version`. Images of other things are skipped."""
        found = {e.annotations.get(REFERENCE, ""): e for e in self.entries}
        return {
            name: entry
            for name, entry in found.items()
            if EXPERT_DIGEST in entry.annotations and re.fullmatch(rf"{NAME}@\d+", name)
        }

    def find(self, member: str) -> str:
        """Find an expert.

        Args:
            member: Its `name@version`. An empty text refers to the only expert.

        Returns:
            The `name@version`.

        Raises:
            UsageError: The text is empty, and there are several experts or none.
            NotFoundError: There is no such expert.
        """
        if member in self.experts:
            return member
        if not member and len(self.experts) == 1:
            return next(iter(self.experts))
        absent = "push an expert to it with hub push"
        if not member:
            known = ", ".join(sorted(self.experts)) or "none"
            raise UsageError(
                f"{self.place} holds {len(self.experts)} experts: {known}",
                f"name one: file:{self.place}#name@version" if self.experts else absent,
            )
        raise NotFoundError(
            f"{self.place} has no {member}", suggest_name(member, self.experts) or absent
        )

    def unpack(self, reference: str, folder: Path) -> dict[str, str]:
        """Write the files of one expert to a folder, and verify each of them.

        Files with other names than experts have are skipped.

        Args:
            reference: The `name@version` of the expert.
            folder: The folder.

        Returns:
            The sha256 of each file by name.

        Raises:
            IntegrityError: A blob is missing or damaged, or two files have one name.
        """
        manifest = self._read_record(
            Manifest, _blob_path(self.experts[reference]), self.experts[reference]
        )
        named: dict[str, Descriptor] = {}
        wanted = list_fetched_files()
        for layer in manifest.layers:
            name = layer.annotations.get(FILE_NAME, "")
            if name in named:
                raise IntegrityError(f"{self.place}: {reference} has two files {name!r}", HINT)
            if matches_any(name, wanted):
                named[name] = layer
        for name, layer in named.items():
            with open_atomically(folder / name) as file:
                for chunk in self._read_chunks(layer):
                    file.write(chunk)
        return {name: layer.digest.removeprefix("sha256:") for name, layer in named.items()}

    def _read_chunks(self, wanted: Descriptor) -> Iterator[bytes]:
        """Yield the bytes of a blob; raise an error at the end if its digest differs."""
        section = self._find_section(_blob_path(wanted))
        damaged = IntegrityError(f"{self.place}: blob {wanted.digest[7:19]} is damaged", HINT)
        if section.size != wanted.size:
            raise damaged
        digest = hashlib.sha256()
        with section.path.open("rb") as file:
            for chunk in read_chunks(file, section.offset, section.size):
                digest.update(chunk)
                yield chunk
        if f"sha256:{digest.hexdigest()}" != wanted.digest:
            raise damaged

    def _find_section(self, name: str) -> Section:
        """Find the place of a file."""
        if name not in self.files:
            raise IntegrityError(f"{self.place} has no {name}", HINT)
        return self.files[name]

    def _read_record(self, kind: type[Known], name: str, wanted: Descriptor | None = None) -> Known:
        """Read a JSON file as a record."""
        section = self._find_section(name)
        if section.size > MAX_JSON:
            raise IntegrityError(
                f"{self.place}: {name} has {section.size} bytes, more than {MAX_JSON}", HINT
            )
        if wanted is None:
            with section.path.open("rb") as file:
                file.seek(section.offset)
                text = file.read(section.size)
        else:
            text = b"".join(self._read_chunks(wanted))
        try:
            return kind.model_validate_json(text)
        except (ValidationError, RecursionError) as error:
            fact = (
                error.errors()[0]["msg"]
                if isinstance(error, ValidationError)
                else "it is nested too deeply"
            )
            raise IntegrityError(f"{self.place}: {name} is damaged: {fact}", HINT) from None


def _blob_path(descriptor: Descriptor) -> str:
    """Return the name of the file that holds a blob."""
    return "blobs/" + descriptor.digest.replace(":", "/")
