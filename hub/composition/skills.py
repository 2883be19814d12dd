"""Inventories of skills at load time: folded into the weights for one task, or beside them for several."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from experthub.hub.composition.weights import Contents, Tensors
from experthub.hub.errors import UsageError
from experthub.hub.files.yaml_files import did_you_mean
from experthub.hub.formats.skills import SkillsRecord, read_skills
from experthub.hub.recipes.plan import Plan
from experthub.hub.registry.expert import SKILLS, SKILLS_JSON
from experthub.hub.store.store import Store
from experthub.merge import LowRank, TaskVector
from experthub.routing import AVERAGE, ExpertStack, Skills
from torch import nn


class Inventory:
    """A stored inventory: its description, and the skills of every module."""

    def __init__(self, digest: str, store: Store, tensors: Tensors) -> None:
        record, locate = store.file(digest, SKILLS_JSON), store.locate(digest, SKILLS)
        self.record, adapted = read_skills(record, locate)
        self.adapted = {a.module: a for a in adapted}
        self._tensors = tensors

    def __getitem__(self, module: str) -> Skills:
        adapted, record = self.adapted[module], self.record
        logits = self._tensors[record.logits_of(module)].float()
        return Skills(
            self._tensors[adapted.a].float(),
            self._tensors[adapted.b].float(),
            adapted.scale,
            dict(zip(record.tasks, logits, strict=True)),
        )


def inventory_of(plan: Plan, contents: Contents, store: Store) -> Inventory:
    """The inventory that a plan's route is over."""
    digest = plan.members[0].digest
    return Inventory(digest, store, Tensors(contents[digest, SKILLS]))


def check_skills(plan: Plan, record: SkillsRecord) -> None:
    """Refuse a route by another router than the inventory's, or for a task that it does not know."""
    method, expert = plan.recipe.method, plan.experts[0]
    several = record.router if record.router in ("poly", "mhr") else "poly"
    if method.method != several:
        raise UsageError(
            f"{expert.label} is an inventory of {record.router}, and the recipe says "
            f"{method.method}",
            f"say method: {several}",
        )
    task = method.options["task"]
    if task not in (None, AVERAGE, *record.tasks):
        hint = did_you_mean(str(task), [AVERAGE, *record.tasks])
        raise UsageError(f"{expert.label} does not know the task {task!r}", hint)


def task_of(plan: Plan, record: SkillsRecord) -> str | None:
    """The task that a route is for; None where every row of a batch has its own."""
    task: str | None = plan.recipe.method.options["task"]
    return record.tasks[0] if task is None and len(record.tasks) == 1 else task


def folded(plan: Plan, inventory: Inventory, task: str) -> TaskVector:
    """The plain LoRA of one task, as a lazy task vector."""
    weight = plan.experts[0].weight

    def fold(name: str) -> LowRank:
        return inventory[name.removesuffix(".weight")].fold(task).scaled(weight)

    load = {name: (lambda name=name: fold(name)) for name in plan.parameters}
    return TaskVector(plan.base.fingerprint, load, seed=plan.members[0].digest)


def fold_into(model: Any, vector: TaskVector) -> dict[str, nn.Module]:
    """Put modules in the place of others that have a task vector's changes; returns the originals."""
    originals = {}
    for parameter in vector:
        name = parameter.removesuffix(".weight")
        original = model.get_submodule(name)
        module = copy.copy(original)
        module._parameters = dict(original._parameters)
        changed = vector[parameter].add_to(original.weight)
        module._parameters["weight"] = nn.Parameter(changed, requires_grad=False)
        model.set_submodule(name, module)
        originals[name] = original
    return originals


def stacks(plan: Plan, inventory: Inventory) -> Iterator[tuple[str, ExpertStack]]:
    """Every task's plain LoRA, and their average at the end, for each module in turn."""
    tasks = [*inventory.record.tasks, AVERAGE]
    for name in (parameter.removesuffix(".weight") for parameter in plan.parameters):
        skills = inventory[name]
        deltas = {e: skills.fold(t).scaled(plan.experts[0].weight) for e, t in enumerate(tasks)}
        yield name, ExpertStack.of(deltas, len(tasks))


def by_row(record: SkillsRecord) -> Any:
    """From the names of rows' tasks to weights over the stacks: `average` for those it does not know."""
    from experthub.routing import Weights

    places = {task: e for e, task in enumerate(record.tasks)}

    def select(names: list[str]) -> Weights:
        chosen = torch.tensor([[places.get(name, len(places))] for name in names])
        return Weights(torch.ones(len(names), 1), chosen)

    return select
