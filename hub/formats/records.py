"""Records: JSON files that are validated by pydantic models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.files.patterns import check_pattern
from experthub.hub.files.yaml_files import Closed
from pydantic import AfterValidator, BaseModel, Field, StringConstraints, ValidationError

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Pattern = Annotated[str, AfterValidator(check_pattern)]  # A regular expression.
RecordType = TypeVar("RecordType", bound=BaseModel)


class StateExpert(Closed):
    """An expert that the state of a method was made for.

    Args:
        expert: The label of the expert in the recipe.
        digest: The digest of its content, or of everything that a nested merge is made of.
    """

    expert: str
    digest: Digest


def read_record(model: type[RecordType], path: Path, tensors: Path, hint: str) -> RecordType:
    """Read the record that describes a file of tensors.

    Args:
        model: The class of the record.
        path: The JSON file.
        tensors: The file of tensors, for the error if there is no record.
        hint: The hint of the errors.

    Returns:
        The record.

    Raises:
        IntegrityError: The file is missing or damaged, or a field is not valid.
    """
    if not path.is_file():
        raise IntegrityError(f"there is no {path.name} beside {tensors}", hint)
    return validate_record(model, read_json(path), path, hint)


def validate_record(
    model: type[RecordType], values: dict[str, Any], path: Path, hint: str
) -> RecordType:
    """Validate plain values as a record.

    Args:
        model: The class of the record.
        values: The values by key.
        path: The file that the values come from, for the error.
        hint: The hint of the error.

    Returns:
        The record.

    Raises:
        IntegrityError: A field is not valid. The error names the first one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{path}: {where}: {first['msg']}", hint) from None
