"""Inventories of skills for training: their shape, their modules in a model, and their files.

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
from experthub.hub.composition.skills import Inventory
from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.atomic import create_folder
from experthub.hub.files.spelling import check_choice
from experthub.hub.formats.adapter_writer import write_adapter
from experthub.hub.formats.dense_parts import PREFIX
from experthub.hub.formats.skills import (
    Granularity,
    SkillsRecord,
    Training,
    find_logits_owner,
    write_skills,
)
from experthub.routing import AVERAGE, MULTI_HEADED, BatchTasks, SkilledLinear, check_heads
from torch import Tensor, nn

LOGIT_RANGE = 1e-3  # Logits are drawn from -LOGIT_RANGE to LOGIT_RANGE, as in the authors' code.
SURE = 30.0  # The sigmoid of this logit is 1 to 13 digits, and that of its negative is 0.


@dataclass(frozen=True)
class InventoryShape:
    """The shape of an inventory of skills, and the way in which its router is trained.

    Args:
        router: `poly` or `mhr` learns a mixture of the skills for each task. `shared` trains one
            skill for all tasks and `private` one skill per task, both without a learned router.
        skills: The number of skills S, at least 1. `shared` and `private` ignore it.
        heads: The number of heads H, at least 1. Only `mhr` can have more than 1.
        rank: The rank of every skill, at least 1.
        alpha: LoRA's alpha. The default is the rank, so that the scale is 1.
        granularity: The part of the model that has its own logits: each `linear` module, each
            `layer`, or the whole `model`.
        relaxed: Draw the gates in training from relaxed Bernoulli distributions. The default uses
            the sigmoid of the logits.

    Example:
        >>> from experthub.hub import InventoryShape
        >>> InventoryShape(router="poly", skills=4, rank=2).heads
        1
    """

    router: Training = "mhr"
    skills: int = 8
    heads: int = 1
    rank: int = 4
    alpha: float | None = None
    granularity: Granularity = "linear"
    relaxed: bool = False

    def record(self, base: str, tasks: Sequence[str], modules: Sequence[str]) -> SkillsRecord:
        """Describe an inventory of this shape as it is stored in `skills.json`.

        Args:
            base: The name of the base.
            tasks: The tasks, in the order of the logits' rows.
            modules: The modules that get skills.

        Returns:
            The description.

        Raises:
            UsageError: The router cannot have several heads.
        """
        if self.heads > 1 and self.router not in MULTI_HEADED:
            raise UsageError(
                f"{self.router} has one head, not {self.heads}",
                f"use --router {' or '.join(MULTI_HEADED)}, or --heads 1",
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


def parse_shape(
    router: str,
    skills: int,
    heads: int,
    rank: int,
    alpha: float | None,
    granularity: str,
    relaxed: bool,
) -> InventoryShape:
    """Check the options of a command, and return the shape that they describe.

    Args:
        router: One of `poly`, `mhr`, `shared` and `private`.
        skills: The number of skills.
        heads: The number of heads.
        rank: The rank of every skill.
        alpha: LoRA's alpha, or None for the rank.
        granularity: One of `linear`, `layer` and `model`.
        relaxed: Whether gates are drawn in training.

    Returns:
        The shape.

    Raises:
        UsageError: The router or the granularity is unknown.
    """
    check_choice(router, get_args(Training), "--router")
    check_choice(granularity, get_args(Granularity), "--granularity")
    return InventoryShape(
        cast(Training, router), skills, heads, rank, alpha, cast(Granularity, granularity), relaxed
    )


# Module -> the factors A `[S, R, I]` and B `[S, O, R]` with which training starts.
InitialSkills = dict[str, tuple[Tensor, Tensor]]


def initialise_skills(model: Any, record: SkillsRecord) -> InitialSkills:
    """Draw new skills: A as in LoRA, differently for each skill, and B zero.

    Args:
        model: The model.
        record: The description of the inventory.

    Returns:
        The factors of every module. They do not change the model yet.
    """
    start = {}
    for name in record.target_modules:
        outputs, inputs = model.get_submodule(name).weight.shape
        a_SRI = torch.empty(record.n_skills, record.rank, inputs).uniform_(-1, 1)
        start[name] = a_SRI / math.sqrt(inputs), torch.zeros(record.n_skills, outputs, record.rank)
    return start


def load_skills(inventory: Inventory, record: SkillsRecord) -> InitialSkills:
    """Load stored skills, or their average if the new inventory has fewer skills.

    Args:
        inventory: The stored inventory.
        record: The description of the new inventory. It has the stored shape, or a single skill.

    Returns:
        The factors of every module.
    """
    start = {}
    for name in record.target_modules:
        skills = inventory[name]
        if record.n_skills < len(skills.a_SRI):
            lora = skills.fold(AVERAGE)
            start[name] = lora.a[None].clone(), lora.b[None].clone()
        else:
            start[name] = skills.a_SRI.clone(), skills.b_SOR.clone()
    return start


def insert_skills(
    model: Any, record: SkillsRecord, start: InitialSkills, rows: BatchTasks, relaxed: bool
) -> dict[str, SkilledLinear]:
    """Replace modules of a model by frozen ones with trainable skills beside them.

    Args:
        model: The model; all of its own parameters are frozen.
        record: The description of the inventory.
        start: The factors with which training starts.
        rows: The tasks of the current batch, shared by all modules.
        relaxed: Whether gates are drawn in training.

    Returns:
        The new modules by path.

    Raises:
        UsageError: The number of heads does not divide the width of a module.
    """
    model.requires_grad_(False)
    logits: dict[str, nn.Parameter] = {}
    skilled = {}
    for name, (a_SRI, b_SOR) in start.items():
        place = find_logits_owner(name, record.granularity)
        if place not in logits:
            logits[place] = nn.Parameter(_initialise_logits(record))
        base = model.get_submodule(name)
        try:
            check_heads(record.n_heads, base.in_features, base.out_features)
        except ValueError as error:
            raise UsageError(
                f"{name}: {error}", "choose another number of heads with --heads"
            ) from None
        scale = record.alpha / record.rank
        module = SkilledLinear(base, a_SRI, b_SOR, scale, logits[place], rows, relaxed=relaxed)
        model.set_submodule(name, module.to(model.device))
        skilled[name] = module
    return skilled


def _initialise_logits(record: SkillsRecord) -> Tensor:
    """Return the logits `[tasks, H, S]` before training."""
    shape = len(record.tasks), record.n_heads, record.n_skills
    if record.router == "shared":
        return torch.zeros(shape)
    if record.router == "private" and shape[0] == shape[2]:
        return (2 * torch.eye(shape[0])[:, None] - 1) * SURE
    return torch.empty(shape).uniform_(-LOGIT_RANGE, LOGIT_RANGE)


def count_trainable(model: nn.Module) -> int:
    """Count the trainable parameters of a model.

    Args:
        model: The model.

    Returns:
        The number of entries of all parameters that require a gradient.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save_skills(folder: Path, record: SkillsRecord, skilled: dict[str, SkilledLinear]) -> None:
    """Write an inventory to a new folder, its skills in bfloat16 and its logits in float32.

    Args:
        folder: The folder, which must not exist.
        record: The description of the inventory.
        skilled: The trained modules by path.
    """
    skills = {name: (m.skill_a, m.skill_b, m.logits) for name, m in skilled.items()}
    with create_folder(folder) as draft:
        write_skills(draft, record, skills)


def save_lora(
    folder: Path, record: SkillsRecord, skilled: dict[str, SkilledLinear], base: Base
) -> None:
    """Write the only skill of an inventory to a new folder as a plain LoRA.

    The scale is multiplied into B, so that alpha equals the rank.

    Args:
        folder: The folder, which must not exist.
        record: The description of the inventory.
        skilled: The trained modules by path.
        base: The base.

    Raises:
        HubError: A trained tensor holds NaN or infinity.
    """
    tensors = {}
    for name, module in skilled.items():
        scaled = module.skill_b[0] * module.scale
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.skill_a[0].detach().cpu().bfloat16()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = scaled.detach().cpu().bfloat16()
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise HubError("training diverged", "lower --lr")
    with create_folder(folder) as draft:
        write_adapter(
            draft,
            tensors,
            base=base.public_name,
            task_type=base.peft_task_type,
            model_class=base.architecture,
            transposed=False,
            pad=True,
        )
