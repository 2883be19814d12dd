"""What an inventory of skills is before it is trained, and how it is put beside a model and stored.

Shapes: S skills, R rank, I inputs, O outputs, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from experthub.hub.bases.base import Base
from experthub.hub.composition.export import write_portable
from experthub.hub.composition.skills import Inventory
from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.atomic import create_folder, write_json
from experthub.hub.formats.adapter import PREFIX
from experthub.hub.formats.skills import Granularity, SkillsRecord, Training, place_of
from experthub.hub.kinds.skills import SKILLS, SKILLS_JSON
from experthub.hub.training.objectives import FROZEN
from experthub.routing import AVERAGE, MULTI_HEADED, BatchTasks, SkilledLinear, check_heads
from torch import Tensor, nn

START = 1e-3  # logits are drawn from -START to START, as the authors draw them
SURE = 30.0  # a logit whose sigmoid is 1, or 0, to 13 digits


@dataclass(frozen=True)
class InventoryShape:
    """What an inventory is like.

    router: `poly` or `mhr`; `shared` has one skill for all tasks, `private` one for each, both
    without a router that learns.  skills, heads: S and H, at least 1; heads above 1 need `mhr`.
    rank: of every skill.  alpha: of LoRA, the rank by default, so that the scale is 1.
    granularity: what has logits of its own: each `linear`, each `layer`, or the `model`.  relaxed:
    gates are drawn in training.
    """

    router: Training = "mhr"
    skills: int = 8
    heads: int = 1
    rank: int = 4
    alpha: float | None = None
    granularity: Granularity = "linear"
    relaxed: bool = False

    def record(self, base: str, tasks: Sequence[str], modules: Sequence[str]) -> SkillsRecord:
        """The description of an inventory of this shape; UsageError for one that cannot be."""
        if self.heads > 1 and self.router not in MULTI_HEADED:
            raise UsageError(
                f"{self.router} has one head, not {self.heads}",
                f"use --router {', '.join(MULTI_HEADED)}",
            )
        n_skills = {"shared": 1, "private": len(tasks)}.get(self.router, self.skills)
        return SkillsRecord(
            router=self.router,
            n_skills=n_skills,
            n_heads=self.heads,
            rank=self.rank,
            alpha=self.rank if self.alpha is None else self.alpha,
            tasks=list(tasks),
            target_modules=list(modules),
            base=base,
            granularity=self.granularity,
        )


def shape_of(
    router: str,
    skills: int,
    heads: int,
    rank: int,
    alpha: float | None,
    granularity: str,
    relaxed: bool,
) -> InventoryShape:
    """A shape out of words; UsageError for one that is none of the choices."""
    for word, choices in ((router, get_args(Training)), (granularity, get_args(Granularity))):
        if word not in choices:
            raise UsageError(f"unknown choice {word!r}", f"use one of {', '.join(choices)}")
    return InventoryShape(
        cast(Training, router),
        skills,
        heads,
        rank,
        alpha,
        cast(Granularity, granularity),
        relaxed,
    )


def linears(model: Any, base: Base) -> list[str]:
    """The linear modules that experts adapt: all but the output layer and what stays frozen."""
    head = model.get_output_embeddings() if base.causal else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (base.causal or not name.startswith(FROZEN))
    ]


Start = dict[str, tuple[Tensor, Tensor]]


def untrained(model: Any, record: SkillsRecord) -> Start:
    """A as LoRA draws it, a different one for each skill; B zero, so that nothing changes yet."""
    start = {}
    for name in record.target_modules:
        outputs, inputs = model.get_submodule(name).weight.shape
        a_SRI = torch.empty(record.n_skills, record.rank, inputs).uniform_(-1, 1) / math.sqrt(
            inputs
        )
        start[name] = a_SRI, torch.zeros(record.n_skills, outputs, record.rank)
    return start


def stored(inventory: Inventory, record: SkillsRecord) -> Start:
    """The skills as they are stored, or their average where one is left."""
    start = {}
    for name in record.target_modules:
        skills = inventory[name]
        if record.n_skills < len(skills.a_SRI):
            lora = skills.fold(AVERAGE)
            start[name] = lora.a[None].clone(), lora.b[None].clone()
        else:
            start[name] = skills.a_SRI.clone(), skills.b_SOR.clone()
    return start


def beside(
    model: Any, record: SkillsRecord, start: Start, rows: BatchTasks, relaxed: bool
) -> dict[str, SkilledLinear]:
    """Put trainable skills beside the frozen modules of a model."""
    model.requires_grad_(False)
    logits: dict[str, nn.Parameter] = {}
    skilled = {}
    for name, (a_SRI, b_SOR) in start.items():
        place = place_of(name, record.granularity)
        if place not in logits:
            logits[place] = nn.Parameter(_logits(record))
        base = model.get_submodule(name)
        try:
            check_heads(record.n_heads, base.in_features, base.out_features)
        except ValueError as error:
            raise UsageError(f"{name}: {error}", "choose another number of heads") from None
        scale = record.alpha / record.rank
        module = SkilledLinear(base, a_SRI, b_SOR, scale, logits[place], rows, relaxed=relaxed)
        model.set_submodule(name, module.to(model.device))
        skilled[name] = module
    return skilled


def _logits(record: SkillsRecord) -> Tensor:
    """`[tasks, H, S]` before training."""
    shape = len(record.tasks), record.n_heads, record.n_skills
    if record.router == "shared":
        return torch.zeros(shape)
    if record.router == "private" and shape[0] == shape[2]:
        return (2 * torch.eye(shape[0])[:, None] - 1) * SURE
    return torch.empty(shape).uniform_(-START, START)


def trainable(model: nn.Module) -> int:
    """How many numbers of a model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save_skills(folder: Path, record: SkillsRecord, skilled: dict[str, SkilledLinear]) -> None:
    """Write a new folder with an inventory."""
    from safetensors.torch import save_file

    tensors = {}
    for name, module in skilled.items():
        tensors[f"{name}.skill_a"] = module.skill_a.detach().cpu().bfloat16().contiguous()
        tensors[f"{name}.skill_b"] = module.skill_b.detach().cpu().bfloat16().contiguous()
        tensors[record.logits_of(name)] = module.logits.detach().cpu().clone()
    with create_folder(folder) as draft:
        save_file(tensors, draft / SKILLS, metadata={"format": "pt"})
        write_json(draft / SKILLS_JSON, record.model_dump(mode="json", by_alias=True))


def save_lora(
    folder: Path, record: SkillsRecord, skilled: dict[str, SkilledLinear], base: Base
) -> None:
    """The one skill as a plain adapter, its scale in B."""
    tensors = {}
    for name, module in skilled.items():
        scaled = module.skill_b[0] * module.scale
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.skill_a[0].detach().cpu().bfloat16()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = scaled.detach().cpu().bfloat16()
    task_type = "CAUSAL_LM" if base.causal else "FEATURE_EXTRACTION"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise HubError("training diverged", "lower --lr")
    with create_folder(folder) as draft:
        write_portable(draft, tensors, record.target_modules, base.name, task_type, False)
