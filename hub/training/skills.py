"""Training inventories of skills on several tasks (Poly, MHR), and adapting them to a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
from experthub.hub.bases.base import load_model
from experthub.hub.bases.base_sources import find
from experthub.hub.composition.skills import Inventory
from experthub.hub.errors import UsageError
from experthub.hub.formats.safetensors_reader import Tensors
from experthub.hub.kinds import kinds
from experthub.hub.kinds.skills import INVENTORY, SKILLS
from experthub.hub.recipes.examples import few
from experthub.hub.registry.content import Content
from experthub.hub.registry.entries import check_name
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.session import Session
from experthub.hub.tasks.task import Example, Task
from experthub.hub.tasks.task_files import read_task
from experthub.hub.training.fit import Settings, fit
from experthub.hub.training.inventory import (
    InventoryShape,
    beside,
    linears,
    save_lora,
    save_skills,
    stored,
    trainable,
    untrained,
)
from experthub.hub.training.objectives import Objective, objective_for
from experthub.hub.transfer.describe import checkpoint_folder, describe
from experthub.hub.transfer.pull import pull
from experthub.routing import BatchTasks
from torch import Tensor

Tune = Literal["all", "z", "mu"]
Z_LR = 0.1  # peak learning rate of a router that is trained alone


@dataclass(frozen=True)
class MultiTask:
    """An objective over rows of several tasks, which the model's skilled modules are told."""

    inner: Objective
    rows: BatchTasks

    def row(self, task: Task, example: Example) -> Any:
        return self.inner.row(task, example)

    def batch(self, rows: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        tasks = torch.tensor([task for task, _ in rows])
        return {"tasks": tasks, "inner": self.inner.batch([row for _, row in rows])}

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        self.rows.tasks = batch["tasks"]
        return self.inner.loss(model, batch["inner"])


def train_skills(
    base: str,
    tasks: Sequence[str],
    name: str,
    shape: InventoryShape,
    settings: Settings,
    *,
    router_lr: float | None = None,
    session: Session | None = None,
) -> Expert:
    """Train an inventory of skills on several tasks together, and store it.

    Every batch mixes tasks. An interrupted run continues from its last checkpoint.

    Args:
        base: The base: a registry name, a folder, `hf:...` or `pypi:...`.
        tasks: References of different tasks.
        name: The name of the inventory in the user's own registry.
        shape: The router, and the number and the rank of the skills.
        settings: Steps, batch size, learning rate, seed, and the largest number of examples per task.
        router_lr: The peak learning rate of the router's logits. The default is ten times that of the
            skills. Ponti et al. search from ten to a thousand times; Caccia et al. use a hundred
            times, with Adafactor.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.

    Returns:
        The registered inventory.

    Raises:
        UsageError: A task is named twice, or the name is malformed.
        HubError: The base or a task cannot be read, or training diverged.
    """
    session = session or Session()
    check_name(name)
    if len(set(tasks)) < len(tasks):
        raise UsageError("a task stands twice", "name each once")
    read = [read_task(task) for task in tasks]
    found = find(base, session)
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", session.device)
    record = shape.record(found.name, tasks, linears(model, found))
    rows = BatchTasks()
    skilled = beside(model, record, untrained(model, record), rows, shape.relaxed)
    if shape.router in ("shared", "private"):
        for module in skilled.values():
            module.logits.requires_grad_(False)
    numbers = {**asdict(shape), **asdict(settings), "router_lr": _router_lr(router_lr, settings)}
    key = {
        "kind": "skills",
        "base": found.fingerprint,
        "tasks": [t.digest for t in read],
        **numbers,
    }
    run = checkpoint_folder(name, key)
    objective = MultiTask(objective_for(found, session.device), rows)
    examples = [
        (i, objective.row(task, e))
        for i, task in enumerate(read)
        for e in task.split("train", settings.examples)
    ]
    what = f"training on {len(tasks)} tasks"
    loss = fit(
        model, objective, examples, settings, run, what, session.report, numbers["router_lr"]
    )
    save_skills(run / "expert", record, skilled)
    training = {**numbers, "tasks": list(tasks), "trainable": trainable(model), "loss": loss}
    return describe(run / "expert", name, found, session, task=None, training=training)


def adapt(
    skills: str,
    task: str,
    name: str,
    tune: Tune,
    settings: Settings,
    *,
    shots: int = 16,
    router_lr: float | None = None,
    session: Session | None = None,
) -> Expert:
    """Adapt a stored inventory to a new task with a few examples, and store the result.

    Args:
        skills: The inventory's reference.
        task: The new task's reference.
        name: The name of the result in the user's own registry.
        tune: `all` trains the skills and a new router, `z` trains the router alone; both give an
            inventory of this one task. `mu` trains the average of the skills and gives a plain LoRA.
            The authors train every skill under fixed weights 1 / S instead (Caccia et al., section
            3.2). That is the same apart from the optimiser's epsilon, and needs S times the memory.
        settings: Steps, batch size, learning rate and seed.
        shots: The number of examples of the training split, spread evenly over the classes.
        router_lr: The peak learning rate of the router's logits. The default for `z` is 0.1, the
            lower of the two that the authors search; otherwise it is that of `train_skills`.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.

    Returns:
        The registered inventory or LoRA.

    Raises:
        UsageError: The expert is not an inventory, or has no router to train.
        HubError: The base or the task cannot be read, or training diverged.
    """
    session = session or Session()
    store = session.store
    check_name(name)
    expert = session.registry.expert(Reference.parse(skills))
    if kinds[expert.kind] is not INVENTORY:
        raise UsageError(f"{expert.reference} is no inventory of skills", "see hub train skills")
    pull(session, Content.of(expert))
    read, found = read_task(task), find(expert.base, session)
    inventory = Inventory(expert.digest, store, Tensors(store.read(expert.digest, SKILLS)))
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", session.device)
    old = inventory.record
    change: dict[str, Any] = {"tasks": [read.reference]}
    if tune == "mu" or old.router == "shared":
        change |= {"router": "shared", "n_skills": 1, "n_heads": 1}
    record, rows = old.model_copy(update=change), BatchTasks()
    skilled = beside(model, record, stored(inventory, record), rows, relaxed=False)
    for module in skilled.values():
        module.skill_a.requires_grad_(tune != "z")
        module.skill_b.requires_grad_(tune != "z")
        module.logits.requires_grad_(record.router != "shared")
    if trainable(model) == 0:
        raise UsageError(f"{expert.reference} has no router to train", "say --tune all or mu")
    examples = few(read, shots)
    numbers = {
        **asdict(settings),
        "shots": shots,
        "tune": tune,
        "router_lr": Z_LR if router_lr is None and tune == "z" else _router_lr(router_lr, settings),
    }
    key = {"kind": "adapt", "skills": expert.digest, "task": read.digest, **numbers}
    run = checkpoint_folder(name, key)
    objective = MultiTask(objective_for(found, session.device), rows)
    pairs = [(0, objective.row(read, e)) for e in examples]
    what = f"adapting to {read.reference}"
    loss = fit(model, objective, pairs, settings, run, what, session.report, numbers["router_lr"])
    if tune == "mu":
        save_lora(run / "expert", record, skilled, found)
    else:
        save_skills(run / "expert", record, skilled)
    training = {**numbers, "skills": expert.reference, "trainable": trainable(model), "loss": loss}
    made = read.reference
    return describe(run / "expert", name, found, session, task=made, training=training)


def _router_lr(given: float | None, settings: Settings) -> float:
    return 10 * settings.lr if given is None else given


def tune_of(word: str) -> Tune:
    """What to train, out of a word; UsageError for any other."""
    if word not in get_args(Tune):
        raise UsageError(f"unknown --tune {word!r}", f"use one of {', '.join(get_args(Tune))}")
    return cast(Tune, word)
