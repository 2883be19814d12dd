"""The files of the state of a router: `router.json` and `router.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Digest, Finite, StateExpert, read_record
from experthub.hub.formats.safetensors_header import read_header
from pydantic import Field

ROUTER = "router.safetensors"
ROUTER_JSON = "router.json"
ALLOWED_DTYPES = ("F32", "I64")
HINT = "get both files again, or make the state again with hub router"


class RouterRecord(Closed):
    """The content of `router.json`, schema 1: how the state of a router was made.

    Args:
        schema_: The version of the record, written as `schema`.
        method: The router.
        options: The options of the router.
        experts: The experts, in the order that the tensors use.
        embedder: The digest of the base that embedded an index; the fingerprint of its weights in
            files of earlier versions.
        data: The digest of the examples that the state was made from.
        history: The loss of each step, if the state was trained.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    method: str
    options: dict[str, Any] = {}
    experts: Annotated[list[StateExpert], Field(min_length=1)]
    embedder: Digest | None = None
    data: Digest | None = None
    history: list[Finite] = []


def read_router(record: Path, tensors: Path) -> RouterRecord:
    """Read the record of a router's state, and check the header of the tensors.

    Args:
        record: The path of `router.json`.
        tensors: The path of `router.safetensors`.

    Returns:
        The record.

    Raises:
        IntegrityError: A file is missing or malformed, or a tensor has another dtype.
    """
    found = read_record(RouterRecord, record, tensors, HINT)
    for name, info in read_header(tensors).items():
        if info.dtype not in ALLOWED_DTYPES:
            raise IntegrityError(
                f"{tensors}: {name} is {info.dtype}, expected {' or '.join(ALLOWED_DTYPES)}", HINT
            )
    return found
