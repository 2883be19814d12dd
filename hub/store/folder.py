"""Reading an expert's folder: check every file, and compute the identity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experthub.hub.errors import IntegrityError, NotFoundError
from experthub.hub.files.digests import find_not_finite, sha256_of
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.safetensors_header import check_finite, read_header
from experthub.hub.kinds import kinds
from experthub.hub.registry.expert import DESCRIPTION, FileInfo, Identity
from pydantic import ValidationError


def read_folder(folder: Path, hashed: Mapping[str, str] = MappingProxyType({})) -> Identity:
    """Check every file of an expert's folder, and compute the expert's identity.

    Args:
        folder: The folder.
        hashed: The sha256 of files by name, for files that were hashed already.

    Returns:
        The identity that `expert.json` states. Without that file, an identity without a base.

    Raises:
        NotFoundError: There is no such folder.
        IntegrityError: The folder holds no expert of a known kind. Or a file is malformed, holds
            NaN or infinity, or differs from `expert.json`.
    """
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no folder {folder}", "name the folder that holds the adapter"
        )
    declared = _read_declared(folder)
    kind = kinds.recognise(folder)
    names = kind.check(folder)
    different = IntegrityError(
        f"{folder}: the files differ from those that its expert.json lists",
        "get the folder again, or remove expert.json if you changed the files",
    )
    sizes = {name: (folder / name).stat().st_size for name in sorted(names)}
    if declared and sizes != {name: info.size for name, info in declared.files.items()}:
        raise different  # Without reading large files to their end.
    for name in names:
        if name.endswith(".safetensors"):
            check_finite(folder / name, read_header(folder / name))
    files = {
        name: FileInfo(sha256=hashed.get(name) or sha256_of(folder / name), size=size)
        for name, size in sizes.items()
    }
    identity = Identity(kind=kind.name, base_fingerprint=None, files=files)
    if declared is None:
        return identity
    if declared.files != files or declared.kind != kind.name:
        raise different
    return declared


def read_description(folder: Path) -> dict[str, Any]:
    """Read the `expert.json` of a folder.

    Args:
        folder: An expert's folder.

    Returns:
        The fields, which are not validated. An empty mapping if there is no such file.

    Raises:
        IntegrityError: The file is damaged, or has NaN or infinity.
    """
    path = folder / DESCRIPTION
    found = read_json(path) if path.is_file() else {}
    for place, number in find_not_finite(found):
        raise IntegrityError(
            f"{path}: {place} is {number}, which is not a finite number",
            "remove the number from expert.json, or measure it again",
        )
    return found


def _read_declared(folder: Path) -> Identity | None:
    """Return the identity that a folder's `expert.json` states, or None without that file."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        return Identity.model_validate(read_description(folder).get("identity"))
    except ValidationError as error:
        raise IntegrityError(
            f"{path} has no valid identity: {error.errors()[0]['msg']}",
            "remove expert.json to read the folder without it",
        ) from None
