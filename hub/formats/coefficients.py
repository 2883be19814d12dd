"""The files of learned coefficients: `coefficients.json` and `coefficients.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Digest, Finite, StateExpert, read_record
from experthub.hub.formats.safetensors_header import TensorInfo, read_header
from pydantic import Field

COEFFICIENTS = "coefficients.safetensors"
COEFFICIENTS_JSON = "coefficients.json"
TENSOR = "coefficients"
MAX_GROUPS = 256
HINT = "get both files again, or learn the coefficients again"


class CoefficientsRecord(Closed):
    """The content of `coefficients.json`, schema 1.

    It describes how coefficients `[experts, blocks]` were learned.

    Args:
        schema_: The version of the record, written as `schema`.
        method: The merge.
        options: The options of the merge.
        granularity: What a block is, such as `layer`.
        combine: Whether outputs or parameters are combined.
        experts: The experts, in the order of the first dimension.
        blocks: The blocks, in the order of the second dimension.
        objective: The objective that was minimised.
        data: The digest of the examples that the coefficients were learned from.
        seed: The seed.
        history: The loss of each step.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    method: str
    options: dict[str, Any] = {}
    granularity: str
    combine: Literal["outputs", "parameters"] = "outputs"
    experts: Annotated[list[StateExpert], Field(min_length=1)]
    blocks: Annotated[list[str], Field(min_length=1)]
    objective: str | None = None
    data: Digest | None = None
    seed: int = 0
    history: list[Finite] = []


def read_coefficients(record: Path, tensors: Path) -> CoefficientsRecord:
    """Read the record of stored coefficients, and check the header of the tensor against it.

    Args:
        record: The path of `coefficients.json`.
        tensors: The path of `coefficients.safetensors`.

    Returns:
        The record.

    Raises:
        IntegrityError: A file is missing or malformed, or the tensor has another shape.
    """
    found = read_record(CoefficientsRecord, record, tensors, HINT)
    header = read_header(tensors)
    info = header.get(TENSOR)
    wanted = (len(found.experts), len(found.blocks))
    fits = info is not None and info.dtype in ("F32", "F64") and info.shape[:2] == wanted
    # A third dimension holds the groups of a partition.
    if len(header) != 1 or info is None or not fits or len(info.shape) > 3 or not _has_groups(info):
        raise IntegrityError(
            f"{tensors}: expected one tensor {TENSOR!r} {list(wanted)}, "
            f"found { ({name: list(i.shape) for name, i in header.items()}) }",
            HINT,
        )
    return found


def _has_groups(info: TensorInfo) -> bool:
    """Tell whether the third dimension, if there is one, is a number of groups."""
    return len(info.shape) == 2 or 1 <= info.shape[2] <= MAX_GROUPS
