"""The files of a router's state: `router.json` and `router.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Digest, read_record
from experthub.hub.formats.safetensors_header import read_header
from pydantic import Field

DTYPES = ("F32", "I64")


class RoutedExpert(Closed):
    """One expert that a router was made for.

    Args:
        expert: Its label in the recipe.
        digest: The digest of its content, or of everything that a nested merge is made of.
    """

    expert: str
    digest: Digest


class RouterRecord(Closed):
    """`router.json`, schema 1: how the state was made.

    Args:
        method: The router.
        options: Its options.
        experts: The experts, in the order that the tensors use.
        embedder: The fingerprint of the base that embedded an index.
        data: The digest of the examples that the state was made from.
        history: The loss per step, for a state that was trained.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    method: str
    options: dict[str, Any] = {}
    experts: Annotated[list[RoutedExpert], Field(min_length=1)]
    embedder: Digest | None = None
    data: Digest | None = None
    history: list[Annotated[float, Field(allow_inf_nan=False)]] = []


def read_router(record: Path, tensors: Path) -> RouterRecord:
    """Read the record of a router's state, and check the tensors' header.

    Args:
        record: `router.json`.
        tensors: `router.safetensors`.

    Returns:
        The record.

    Raises:
        IntegrityError: A file is missing or malformed, or a tensor has another dtype.
    """
    if not record.is_file():
        raise IntegrityError(f"{tensors} has no {record.name} beside it", "get both files")
    found = read_record(RouterRecord, record, "make it again")
    for name, info in read_header(tensors).items():
        if info.dtype not in DTYPES:
            raise IntegrityError(
                f"{tensors}: {name} is {info.dtype}, where {' or '.join(DTYPES)} is expected",
                "make it again with hub router",
            )
    return found
