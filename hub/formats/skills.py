"""The files of an inventory of skills: `skills.json` and `skills.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.adapter import Adapted
from experthub.hub.formats.records import read_record
from experthub.hub.formats.safetensors_header import FLOATS, Header, read_header
from pydantic import Field

AGAIN = "get both files again, or train the inventory again"
MODEL = "model"


# How an inventory was trained: by a router of these names, or without one, with one skill for all
# tasks or with one for each.
Training = Literal["poly", "mhr", "shared", "private"]
Granularity = Literal["linear", "layer", "model"]


class SkillsRecord(Closed):
    """`skills.json`, schema 1: the shape of an inventory, and what it was trained on.

    Args:
        router: `poly` or `mhr`; `shared` has one skill, and `private` one skill per task.
        n_skills: The number of skills, at least 1.
        n_heads: The number of heads, at least 1.
        rank: The rank of each skill, at least 1.
        alpha: The scale of each skill times its rank.
        tasks: The tasks, in the order of the logits' rows.
        target_modules: The modules that have skills.
        base: The name of the base.
        granularity: What has logits of its own: each linear module, each layer, or the model.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    router: Training
    n_skills: Annotated[int, Field(ge=1)]
    n_heads: Annotated[int, Field(ge=1)]
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tasks: Annotated[list[str], Field(min_length=1)]
    target_modules: Annotated[list[str], Field(min_length=1)]
    base: str
    granularity: Granularity = "linear"

    def logits_of(self, module: str) -> str:
        """Return the name of the tensor that holds a module's logits.

        Args:
            module: The module's name.

        Returns:
            The tensor's name.
        """
        return f"{place_of(module, self.granularity)}.logits"


def place_of(module: str, granularity: str) -> str:
    """Return what has the logits of a module.

    Args:
        module: The module's name.
        granularity: `linear`, `layer` or `model`.

    Returns:
        The module itself, the path of its layer, or `model`.
    """
    if granularity == "linear":
        return module
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if granularity == "model" or number is None:
        return MODEL
    return ".".join(parts[: number + 1])


def read_skills(record: Path, tensors: Path) -> tuple[SkillsRecord, tuple[Adapted, ...]]:
    """Read the record of an inventory, and how it changes each module.

    Args:
        record: `skills.json`.
        tensors: `skills.safetensors`; only its header is read.

    Returns:
        The record, and one change per target module.

    Raises:
        IntegrityError: A file is missing or malformed, or the tensors do not fit the record.
    """
    if not record.is_file():
        raise IntegrityError(f"{tensors} has no {record.name} beside it", AGAIN)
    found = read_record(SkillsRecord, record, AGAIN)
    header = read_header(tensors)
    adapted = tuple(_adapted(found, module, header, tensors) for module in found.target_modules)
    wanted = {n for a in adapted for n in (a.a, a.b, found.logits_of(a.module))}
    for name in sorted(wanted ^ set(header)):
        what = "is missing" if name in wanted else "is of no target module"
        raise IntegrityError(f"{tensors}: {name} {what}", AGAIN)
    return found, adapted


def _adapted(record: SkillsRecord, module: str, header: Header, tensors: Path) -> Adapted:
    """Return how an inventory changes one module, after checking its tensors."""
    a, b, logits = f"{module}.skill_a", f"{module}.skill_b", record.logits_of(module)
    for name in (a, b, logits):
        if name not in header:
            raise IntegrityError(f"{tensors}: {name} is missing", AGAIN)
        if header[name].dtype not in FLOATS:
            raise IntegrityError(f"{tensors}: {name} is {header[name].dtype}", AGAIN)
    inputs = header[a].shape[-1] if header[a].shape else 0
    outputs = header[b].shape[1] if len(header[b].shape) == 3 else 0
    shapes = {
        a: (record.n_skills, record.rank, inputs),
        b: (record.n_skills, outputs, record.rank),
        logits: (len(record.tasks), record.n_heads, record.n_skills),
    }
    for name, shape in shapes.items():
        if header[name].shape != shape:
            raise IntegrityError(
                f"{tensors}: {name} is {list(header[name].shape)}, expected {list(shape)}", AGAIN
            )
    if inputs % record.n_heads or outputs % record.n_heads:
        raise IntegrityError(
            f"{tensors}: {record.n_heads} heads do not divide {module} [{outputs}, {inputs}]", AGAIN
        )
    scale = record.alpha / record.rank
    return Adapted(module, record.rank, scale, (outputs, inputs), a, b)
