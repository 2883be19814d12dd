"""The files of an inventory of skills: `skills.json` and `skills.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.files.atomic import write_json
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.adapter import Adapted
from experthub.hub.formats.records import read_record
from experthub.hub.formats.safetensors_header import FLOATS, Header, read_header
from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor

SKILLS = "skills.safetensors"
SKILLS_JSON = "skills.json"
HINT = "get both files again, or train the inventory again"
MODEL = "model"

# `poly` and `mhr` train a router. `shared` has one skill for all tasks, `private` one per task.
Training = Literal["poly", "mhr", "shared", "private"]
Granularity = Literal["linear", "layer", "model"]


class SkillsRecord(Closed):
    """The content of `skills.json`, schema 1: the shape of an inventory, and its training.

    Args:
        schema_: The version of the record, written as `schema`.
        router: The way in which the inventory was trained. `poly` and `mhr` train a router;
            `shared` has one skill for all tasks, and `private` one skill per task.
        n_skills: The number of skills S, at least 1.
        n_heads: The number of heads H, at least 1.
        rank: The rank R of each skill, at least 1.
        alpha: The scale of each skill times its rank.
        tasks: The tasks, in the order of the rows of the logits.
        target_modules: The modules that have skills.
        base: The name of the base.
        granularity: What has logits of its own: each `linear` module, each `layer`, or the `model`.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    router: Training
    n_skills: Annotated[int, Field(ge=1)]
    n_heads: Annotated[int, Field(ge=1)]
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0, lt=1e6)]
    tasks: Annotated[list[str], Field(min_length=1)]
    target_modules: Annotated[list[str], Field(min_length=1)]
    base: str
    granularity: Granularity = "linear"

    def name_logits(self, module: str) -> str:
        """Return the name of the tensor that holds a module's logits.

        Args:
            module: The path of the module.

        Returns:
            The name of the tensor.
        """
        return f"{find_logits_owner(module, self.granularity)}.logits"


def find_logits_owner(module: str, granularity: str) -> str:
    """Find the part of the model whose logits a module uses.

    Args:
        module: The path of the module.
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
        record: The path of `skills.json`.
        tensors: The path of `skills.safetensors`. Only its header is read.

    Returns:
        The record, and one change per target module.

    Raises:
        IntegrityError: A file is missing or malformed, or the tensors do not match the record.
    """
    found = read_record(SkillsRecord, record, tensors, HINT)
    header = read_header(tensors)
    adapted = tuple(_read_change(found, module, header, tensors) for module in found.target_modules)
    wanted = {n for a in adapted for n in (a.a, a.b, found.name_logits(a.module))}
    for name in sorted(wanted ^ set(header)):
        what = "is missing" if name in wanted else "belongs to no target module"
        raise IntegrityError(f"{tensors}: {name} {what}", HINT)
    return found, adapted


def _read_change(record: SkillsRecord, module: str, header: Header, tensors: Path) -> Adapted:
    """Return how an inventory changes one module after checking its tensors."""
    a, b, logits = f"{module}.skill_a", f"{module}.skill_b", record.name_logits(module)
    for name in (a, b, logits):
        if name not in header:
            raise IntegrityError(f"{tensors}: {name} is missing", HINT)
        if header[name].dtype not in FLOATS:
            raise IntegrityError(f"{tensors}: {name} is {header[name].dtype}", HINT)
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
                f"{tensors}: {name} is {list(header[name].shape)}, expected {list(shape)}", HINT
            )
    if inputs % record.n_heads or outputs % record.n_heads:
        raise IntegrityError(
            f"{tensors}: {record.n_heads} heads do not divide {module} [{outputs}, {inputs}]", HINT
        )
    scale = record.alpha / record.rank
    return Adapted(module, record.rank, scale, (outputs, inputs), a, b)


def write_skills(
    folder: Path, record: SkillsRecord, skills: Mapping[str, tuple[Tensor, Tensor, Tensor]]
) -> None:
    """Write the two files of an inventory: the skills in bfloat16, the logits in their own dtype.

    Args:
        folder: An existing folder.
        record: The content of `skills.json`.
        skills: For each target module, the factors A `[S, R, I]` and B `[S, O, R]` and the logits
            `[tasks, H, S]`. Modules that share logits pass the same tensor.
    """
    from safetensors.torch import save_file

    stored = {}
    for name, (a, b, logits) in skills.items():
        stored[f"{name}.skill_a"] = a.detach().cpu().bfloat16().contiguous()
        stored[f"{name}.skill_b"] = b.detach().cpu().bfloat16().contiguous()
        stored[record.name_logits(name)] = logits.detach().cpu().clone()
    save_file(stored, folder / SKILLS, metadata={"format": "pt"})
    write_json(folder / SKILLS_JSON, record.model_dump(mode="json", by_alias=True))
