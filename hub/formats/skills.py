"""Inventories of skills as files: `skills.json` and `skills.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.adapter import Adapted
from experthub.hub.formats.safetensors_header import FLOATS, Header, read_header
from experthub.hub.registry.expert import SKILLS_JSON
from pydantic import Field, ValidationError

AGAIN = "get both files again, or train the inventory again"
MODEL = "model"


class SkillsRecord(Closed):
    """`skills.json`, schema 1.

    router: `shared` has one skill, `private` one for each task.  base: its name.  granularity: what
    has logits of its own.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    router: Literal["poly", "mhr", "shared", "private"]
    n_skills: Annotated[int, Field(ge=1)]
    n_heads: Annotated[int, Field(ge=1)]
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tasks: Annotated[list[str], Field(min_length=1)]
    target_modules: Annotated[list[str], Field(min_length=1)]
    base: str
    granularity: Literal["linear", "layer", "model"] = "linear"

    def logits_of(self, module: str) -> str:
        """The name of the tensor that holds a module's logits."""
        return f"{place_of(module, self.granularity)}.logits"


def place_of(module: str, granularity: str) -> str:
    """What shares its logits with a module: itself, its layer's path, or the whole model."""
    if granularity == "linear":
        return module
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if granularity == "model" or number is None:
        return MODEL
    return ".".join(parts[: number + 1])


def read_skills(record: Path, tensors: Path) -> tuple[SkillsRecord, tuple[Adapted, ...]]:
    """What an inventory is, and how it changes each module; IntegrityError where files do not fit."""
    if not record.is_file():
        raise IntegrityError(f"{tensors} has no {SKILLS_JSON} beside it", AGAIN)
    try:
        found = SkillsRecord.model_validate(read_json(record))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{record}: {where}: {first['msg']}", AGAIN) from None
    header = read_header(tensors)
    adapted = tuple(_adapted(found, module, header, tensors) for module in found.target_modules)
    wanted = {n for a in adapted for n in (a.a, a.b, found.logits_of(a.module))}
    for name in sorted(wanted ^ set(header)):
        what = "is missing" if name in wanted else "is of no target module"
        raise IntegrityError(f"{tensors}: {name} {what}", AGAIN)
    return found, adapted


def _adapted(record: SkillsRecord, module: str, header: Header, tensors: Path) -> Adapted:
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
