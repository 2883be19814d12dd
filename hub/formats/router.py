"""The state of a router as files: `router.json` and `router.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.registry.expert import ROUTER_JSON, Digest
from pydantic import Field, ValidationError

DTYPES = ("F32", "I64")


class RoutedExpert(Closed):
    """One expert that a router was made for; digest: of its content, or of a merge's plan."""

    expert: str
    digest: Digest


class RouterRecord(Closed):
    """`router.json`, schema 1: what the tensors are the state of.

    experts: in the order in which the tensors mean them.  embedder: the fingerprint of the base that
    embedded an index.  data: the digest of the examples that it was made of.  history: the loss by
    step of one that was trained.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    method: str
    options: dict[str, Any] = {}
    experts: Annotated[list[RoutedExpert], Field(min_length=1)]
    embedder: Digest | None = None
    data: Digest | None = None
    history: list[Annotated[float, Field(allow_inf_nan=False)]] = []


def read_router(record: Path, tensors: Path) -> RouterRecord:
    """The description of a stored router; IntegrityError when the tensors cannot be its state."""
    if not record.is_file():
        raise IntegrityError(f"{tensors} has no {ROUTER_JSON} beside it", "get both files")
    try:
        found = RouterRecord.model_validate(read_json(record))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{record}: {where}: {first['msg']}", "make it again") from None
    for name, info in read_header(tensors).items():
        if info.dtype not in DTYPES:
            raise IntegrityError(
                f"{tensors}: {name} is {info.dtype}, where {' or '.join(DTYPES)} is expected",
                "make it again with hub router",
            )
    return found
