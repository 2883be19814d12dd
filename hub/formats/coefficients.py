"""The files of learned coefficients: `coefficients.json` and `coefficients.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Digest, read_record
from experthub.hub.formats.safetensors_header import read_header
from pydantic import Field

TENSOR = "coefficients"
Finite = Annotated[float, Field(allow_inf_nan=False)]


class CoefficientExpert(Closed):
    """One expert that coefficients were learned for.

    Args:
        expert: Its label in the recipe.
        digest: The digest of its content, or of everything that a nested merge is made of.
    """

    expert: str
    digest: Digest


class CoefficientsRecord(Closed):
    """`coefficients.json`, schema 1: how coefficients `[experts, blocks]` were learned.

    Args:
        method: The merge.
        options: Its options.
        granularity: What a block is.
        combine: Whether outputs or parameters are combined.
        experts: The experts, in the order of the first axis.
        blocks: The blocks, in the order of the second axis.
        objective: The objective that was minimised.
        data: The digest of the examples that they were learned on.
        seed: The seed of the run.
        history: The loss per step.
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
    """Read the record of stored coefficients, and check the tensor's header against it.

    Args:
        record: `coefficients.json`.
        tensors: `coefficients.safetensors`.

    Returns:
        The record.

    Raises:
        IntegrityError: A file is missing or malformed, or the tensor has another shape.
    """
    if not record.is_file():
        raise IntegrityError(f"{tensors} has no {record.name} beside it", "get both files")
    found = read_record(CoefficientsRecord, record, "learn them again")
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
