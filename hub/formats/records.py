"""Records in JSON files, validated by pydantic models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from pydantic import BaseModel, StringConstraints, ValidationError

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Record = TypeVar("Record", bound=BaseModel)


def read_record(model: type[Record], path: Path, hint: str) -> Record:
    """Read a JSON file as a record.

    Args:
        model: The record's type.
        path: The file.
        hint: What to do about a file that does not validate.

    Returns:
        The record.

    Raises:
        IntegrityError: The file is damaged, or a field of it does not validate.
    """
    return validate_record(model, read_json(path), path, hint)


def validate_record(model: type[Record], values: dict[str, Any], path: Path, hint: str) -> Record:
    """Validate plain values as a record.

    Args:
        model: The record's type.
        values: The values, by key.
        path: The file that they came from, for the error.
        hint: What to do about values that do not validate.

    Returns:
        The record.

    Raises:
        IntegrityError: A field does not validate; the error names the first one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{path}: {where}: {first['msg']}", hint) from None
