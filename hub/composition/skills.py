"""Inventories of skills in a model: folded into the weights for one task, or routed for several."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from experthub.hub.composition.weights import Contents
from experthub.hub.errors import UsageError
from experthub.hub.files.spelling import suggest_name
from experthub.hub.formats.safetensors_reader import Tensors
from experthub.hub.formats.skills import SKILLS, SKILLS_JSON, SkillsRecord, read_skills
from experthub.hub.recipes.plan import Plan
from experthub.hub.store.store import Store
from experthub.merge import LowRank, TaskVector
from experthub.routing import AVERAGE, SERVED_BY, Batch, ExpertStack, Skills, Weights
from torch import nn


class Inventory:
    """A stored inventory: its description, and the skills of every module.

    Args:
        digest: The digest of the inventory.
        store: The store that holds its files.
        tensors: The tensors of the skills.
    """

    def __init__(self, digest: str, store: Store, tensors: Tensors) -> None:
        record, locate = store.verify_file(digest, SKILLS_JSON), store.locate(digest, SKILLS)
        self.record, adapted = read_skills(record, locate)
        self.adapted = {a.module: a for a in adapted}
        self._tensors = tensors

    def __getitem__(self, module: str) -> Skills:
        """Return the skills of a module by its path."""
        adapted, record = self.adapted[module], self.record
        logits = self._tensors[record.name_logits(module)].float()
        return Skills(
            self._tensors[adapted.a].float(),
            self._tensors[adapted.b].float(),
            adapted.scale,
            dict(zip(record.tasks, logits, strict=True)),
        )


def load_inventory(plan: Plan, contents: Contents, store: Store) -> Inventory:
    """Load the inventory of skills that a plan routes over.

    Args:
        plan: A plan with one route, over one inventory.
        contents: The experts' files.
        store: The store.

    Returns:
        The inventory.

    Raises:
        IntegrityError: A file of the inventory is damaged.
    """
    digest = plan.members[0].digest
    return Inventory(digest, store, Tensors(contents[digest, SKILLS]))


def check_skills(plan: Plan, record: SkillsRecord) -> None:
    """Refuse a router that does not serve the inventory, or a task that it does not know.

    Args:
        plan: A plan with one route, over one inventory.
        record: The description of the inventory.

    Raises:
        UsageError: The method or the task does not fit the inventory.
    """
    method, expert = plan.recipe.method, plan.experts[0]
    served_by = SERVED_BY[record.router]
    if method.method != served_by:
        raise UsageError(
            f"{expert.label} is an inventory of {record.router}, and the recipe sets "
            f"method: {method.method}",
            f"set method: {served_by}",
        )
    if plan.task not in (None, AVERAGE, *record.tasks):
        known = [AVERAGE, *record.tasks]
        hint = suggest_name(str(plan.task), known) or "name a task that the inventory has"
        raise UsageError(f"{expert.label} does not know the task {plan.task!r}", hint)


def fold_task(plan: Plan, inventory: Inventory, task: str) -> TaskVector:
    """Fold the mixture of skills of one task into a plain LoRA, lazily.

    Args:
        plan: A plan with one route, over one inventory.
        inventory: The inventory.
        task: A task that the inventory knows, or `average`.

    Returns:
        The task vector.
    """
    weight = plan.experts[0].weight

    def fold(name: str) -> LowRank:
        return inventory[name.removesuffix(".weight")].fold(task).scaled(weight)

    load = {name: (lambda name=name: fold(name)) for name in plan.parameters}
    return TaskVector(plan.base.fingerprint, load, seed=plan.members[0].digest)


def add_to_modules(model: Any, vector: TaskVector) -> dict[str, nn.Module]:
    """Replace modules by copies whose weights have the changes of a task vector.

    Args:
        model: The transformers model, which is changed in place.
        vector: A task vector that changes the weights of linear modules.

    Returns:
        The original modules by path.
    """
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


def stack_tasks(plan: Plan, inventory: Inventory) -> Iterator[tuple[str, ExpertStack]]:
    """Stack the plain LoRA of every task, and their average at the end, for each module in turn.

    Args:
        plan: A plan with one route, over one inventory.
        inventory: The inventory.

    Yields:
        The path of a module and its stack.
    """
    tasks = [*inventory.record.tasks, AVERAGE]
    for name in (parameter.removesuffix(".weight") for parameter in plan.parameters):
        skills = inventory[name]
        deltas = {e: skills.fold(t).scaled(plan.experts[0].weight) for e, t in enumerate(tasks)}
        yield name, ExpertStack.of(deltas, len(tasks))


@dataclass(frozen=True)
class TaskSelection:
    """A `Select` function that selects the LoRA of each row's task among those of `stack_tasks`.

    Args:
        tasks: The tasks that the inventory knows. Other tasks get the average.
    """

    tasks: tuple[str, ...]

    def __call__(self, batch: Batch) -> Weights:
        """Return the weights of the rows."""
        places, names = {task: e for e, task in enumerate(self.tasks)}, batch.tasks
        chosen = torch.tensor([[places.get(name, len(places))] for name in names])
        return Weights(batch.place(torch.ones(len(names), 1)), batch.place(chosen))
