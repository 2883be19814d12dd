"""registry.yaml as a file: its records, how it is read, and the text that is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from experthub.hub.errors import UsageError
from experthub.hub.files import yaml_files
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Digest
from experthub.hub.registry.expert import NAME, Expert
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


def read_file(path: Path) -> RegistryFile:
    """Read a registry file.

    Args:
        path: The file.

    Returns:
        The record.

    Raises:
        UsageError: The file is not YAML, or a field of it does not validate.
    """
    return yaml_files.validate(RegistryFile, yaml_files.read(path), "docs/registry.md")


def format_file(record: RegistryFile, path: Path) -> str:
    """Format a registry file so that `read_file` can read it again.

    Args:
        record: The record.
        path: Where the text will be written, for errors.

    Returns:
        The text.

    Raises:
        UsageError: The text is too long or too deep to be read.
    """
    try:
        text = yaml_files.dump(record.model_dump(mode="json", exclude_unset=True))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be written: {error}", "shorten the entry") from None
    if len(text.encode()) > yaml_files.MAX_BYTES:
        raise UsageError(
            f"{path} would have more than {yaml_files.MAX_BYTES} bytes",
            "shorten its descriptions, or use another file",
        )
    yaml_files.validate(RegistryFile, yaml_files.parse(text, str(path)))
    return text
