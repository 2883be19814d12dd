"""Learned coefficients as files: `coefficients.json` and `coefficients.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.registry.expert import COEFFICIENTS_JSON, Digest
from pydantic import Field, ValidationError

TENSOR = "coefficients"
Finite = Annotated[float, Field(allow_inf_nan=False)]


class CoefficientExpert(Closed):
    """One expert that coefficients were learned for; digest: of its content, or of a merge's plan."""

    expert: str
    digest: Digest


class CoefficientsRecord(Closed):
    """`coefficients.json`, schema 1: what the numbers `[experts, blocks]` are coefficients of.

    data: the digest of the examples that they were learned on.  history: the loss by step.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    method: str
    options: dict[str, Any] = {}
    granularity: str
    combine: Literal["outputs", "parameters"] = "outputs"
    experts: Annotated[list[CoefficientExpert], Field(min_length=1)]
    blocks: Annotated[list[str], Field(min_length=1)]
    objective: str | None = None
    data: Digest | None = None
    seed: int = 0
    history: list[Finite] = []


def read_coefficients(record: Path, tensors: Path) -> CoefficientsRecord:
    """The description of stored coefficients; IntegrityError when the numbers do not fit it."""
    if not record.is_file():
        raise IntegrityError(f"{tensors} has no {COEFFICIENTS_JSON} beside it", "get both files")
    try:
        found = CoefficientsRecord.model_validate(read_json(record))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{record}: {where}: {first['msg']}", "learn them again") from None
    header = read_header(tensors)
    info = header.get(TENSOR)
    wanted = (len(found.experts), len(found.blocks))
    fits = info is not None and info.dtype in ("F32", "F64") and info.shape[:2] == wanted
    if len(header) != 1 or info is None or not fits or len(info.shape) not in (2, 3):
        raise IntegrityError(
            f"{tensors}: expected one tensor {TENSOR!r} {list(wanted)}, "
            f"found { ({name: list(i.shape) for name, i in header.items()}) }",
            "learn them again",
        )
    return found
