"""The file format of registries: its records, reading and formatting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from experthub.hub.errors import UsageError
from experthub.hub.files import yaml_files
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Digest, Sha256
from experthub.hub.registry.expert import NAME, Expert
from pydantic import Field, field_validator


class BaseEntry(Closed):
    """A registry entry of a base model: its sources, and the checksums that identify it.

    Args:
        sources: The sources, in the order in which they are tried.
        sha256: The sha256 of the weights that a `pypi:` source or a GGUF file must deliver.
        fingerprint: The fingerprint of the base.
        aka: Other names of the base, such as `org/name` on the Hugging Face Hub.
        license: The licence of the base.
        terms: The terms of use, which are shown before the base is fetched.
    """

    sources: Annotated[list[str], Field(min_length=1)]
    sha256: Sha256 | None = None
    fingerprint: Digest | None = None
    aka: list[str] = []
    license: str | None = None
    terms: str | None = None


class RegistryFile(Closed):
    """The content of a `registry.yaml`, version 1.

    Args:
        version: The version of the format.
        bases: The bases by name.
        experts: The entries of experts.
    """

    version: Literal[1]
    bases: dict[str, BaseEntry] = {}
    experts: list[Expert] = []

    @field_validator("bases")
    @classmethod
    def _check_names(cls, bases: dict[str, BaseEntry]) -> dict[str, BaseEntry]:
        """Reject bases with a malformed name."""
        for name in bases:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"{name!r} is not a name")
        return bases


def read_file(path: Path) -> RegistryFile:
    """Read a registry file.

    Args:
        path: The path of the file.

    Returns:
        The validated content.

    Raises:
        UsageError: The file is not YAML, or a field is not valid.
    """
    return yaml_files.validate(RegistryFile, yaml_files.read(path), "docs/registry.md")


def format_file(record: RegistryFile, path: Path) -> str:
    """Format the content of a registry file so that `read_file` can read it again.

    Args:
        record: The content.
        path: The path that the text will be written to; errors name it.

    Returns:
        The YAML text.

    Raises:
        UsageError: The text would be too long, or nested too deeply, to be read again.
    """
    try:
        text = yaml_files.dump(record.model_dump(mode="json", exclude_unset=True))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"cannot write {path}: {error}", "shorten the entry") from None
    if len(text.encode()) > yaml_files.MAX_YAML_BYTES:
        raise UsageError(
            f"{path} would be longer than {yaml_files.MAX_YAML_BYTES} bytes",
            "shorten the descriptions, or write to another registry file",
        )
    yaml_files.validate(RegistryFile, yaml_files.parse(text, str(path)))
    return text
