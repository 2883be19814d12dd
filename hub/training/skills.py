"""Train inventories of skills on several tasks (Poly, MHR), and adapt them to a new task."""

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
from experthub.hub.recipes.examples import choose_few
from experthub.hub.registry.content import Content
from experthub.hub.registry.entries import check_name
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.session import Session
from experthub.hub.tasks.task import Example, Task
from experthub.hub.tasks.task_files import read_task
from experthub.hub.training.fit import Settings, fit
from experthub.hub.training.inventory import (
    InventoryShape,
    count_trainable,
    find_linears,
    initialise_skills,
    insert_skills,
    load_skills,
    save_lora,
    save_skills,
)
from experthub.hub.training.objectives import Objective, make_objective
from experthub.hub.transfer.describe import checkpoint_folder, describe
from experthub.hub.transfer.pull import pull
from experthub.routing import BatchTasks
from torch import Tensor

Tune = Literal["all", "z", "mu"]
Z_LR = 0.1  # The peak learning rate of a router that is trained alone.


@dataclass(frozen=True)
class MultiTask:
    """An objective over batches that mix examples of several tasks.

    Args:
        inner: The objective of the examples of one task.
        rows: The tasks of the current batch, which the modules with skills read.
    """

    inner: Objective
    rows: BatchTasks

    def encode(self, task: Task, example: Example) -> Any:
        """Encode one example with the inner objective.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The encoded example.
        """
        return self.inner.encode(task, example)

    def collate(self, rows: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        """Collate encoded examples, and keep their tasks.

        Args:
            rows: The index of each example's task, and the encoded example.

        Returns:
            `tasks` `[B]`, and the batch of the inner objective as `inner`.
        """
        tasks = torch.tensor([task for task, _ in rows])
        return {"tasks": tasks, "inner": self.inner.collate([row for _, row in rows])}

    def compute_loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Tell the modules the tasks of a batch, and compute the inner loss.

        Args:
            model: The model.
            batch: The batch.

        Returns:
            The loss.
        """
        self.rows.tasks = batch["tasks"]
        return self.inner.compute_loss(model, batch["inner"])


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

    Every batch mixes tasks. An interrupted run continues from its last checkpoint if it is started
    again with the same settings.

    Args:
        base: The base: a registry name, a folder, `hf:...` or `pypi:...`.
        tasks: References of different tasks.
        name: The name of the inventory in the user's own registry.
        shape: The router, and the number and the rank of the skills.
        settings: Steps, batch size, learning rate, seed, and the largest number of examples per
            task.
        router_lr: The peak learning rate of the router's logits. The default is ten times that of
            the skills. Ponti et al. search from ten to a thousand times; Caccia et al. use a
            hundred times, with Adafactor.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.

    Returns:
        The registered inventory.

    Raises:
        UsageError: A task is named twice, the name is malformed, or the number of heads does not
            fit the router or the widths of the base.
        HubError: The base or a task cannot be read, or training diverged.

    Example:
        >>> from experthub import hub
        >>> shape = hub.InventoryShape(router="mhr", skills=4, heads=8)
        >>> tasks = ["bigbench:ruin_names", "bigbench:intent_recognition"]
        >>> settings = hub.Settings(steps=300, batch_size=16)
        >>> hub.train_skills(
        ...     "all-minilm-l6-v2", tasks, "inventory", shape, settings
        ... ).reference  # doctest: +SKIP
        'inventory@1'
    """
    session = session or Session()
    check_name(name)
    repeated = [task for i, task in enumerate(tasks) if task in tasks[:i]]
    if repeated:
        raise UsageError(f"the task {repeated[0]} is named twice", "name each task once")
    read = [read_task(task) for task in tasks]
    found = find(base, session)
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", session.device)
    record = shape.record(found.name, tasks, find_linears(model, found))
    rows = BatchTasks()
    start = initialise_skills(model, record)
    skilled = insert_skills(model, record, start, rows, shape.relaxed)
    if shape.router in ("shared", "private"):
        for module in skilled.values():
            module.logits.requires_grad_(False)
    router_lr = _choose_router_lr(router_lr, settings)
    numbers = {**asdict(shape), **asdict(settings), "router_lr": router_lr}
    key = {
        "kind": "skills",
        "base": found.fingerprint,
        "tasks": [t.digest for t in read],
        **numbers,
    }
    run = checkpoint_folder(name, key)
    objective = MultiTask(make_objective(found, session.device), rows)
    examples = [
        (i, objective.encode(task, e))
        for i, task in enumerate(read)
        for e in task.split("train", settings.examples)
    ]
    what = f"training on {len(tasks)} tasks"
    loss = fit(model, objective, examples, settings, run, what, session.report, router_lr)
    save_skills(run / "expert", record, skilled)
    training = {**numbers, "tasks": list(tasks), "trainable": count_trainable(model), "loss": loss}
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
    """Adapt a stored inventory to a new task with a choose_few examples, and store the result.

    Args:
        skills: The inventory's reference.
        task: The new task's reference.
        name: The name of the result in the user's own registry.
        tune: `all` trains the skills and a new router, `z` trains the router alone; both give an
            inventory of this one task. `mu` trains the average of the skills and gives a plain
            LoRA. The authors train every skill under fixed weights 1 / S instead (Caccia et al.,
            section 3.2). That is the same apart from the optimiser's epsilon, and needs S times the
            memory.
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
        NotFoundError: No registry knows the expert.
        HubError: The base or the task cannot be read, or training diverged.

    Example:
        >>> from experthub import hub
        >>> settings = hub.Settings(steps=100, batch_size=8)
        >>> hub.adapt(
        ...     "inventory", "bigbench:emoji_movie", "emojis", "all", settings
        ... ).reference  # doctest: +SKIP
        'emojis@1'
    """
    session = session or Session()
    store = session.store
    check_name(name)
    expert = session.registry.expert(Reference.parse(skills))
    if kinds[expert.kind] is not INVENTORY:
        raise UsageError(
            f"{expert.reference} is {kinds[expert.kind].label}, not an inventory of skills",
            "train an inventory with hub train skills",
        )
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
    skilled = insert_skills(model, record, load_skills(inventory, record), rows, relaxed=False)
    for module in skilled.values():
        module.skill_a.requires_grad_(tune != "z")
        module.skill_b.requires_grad_(tune != "z")
        module.logits.requires_grad_(record.router != "shared")
    if count_trainable(model) == 0:
        raise UsageError(
            f"{expert.reference} has no router to train", "use --tune all or --tune mu"
        )
    examples = choose_few(read, shots)
    numbers = {
        **asdict(settings),
        "shots": shots,
        "tune": tune,
        "router_lr": Z_LR
        if router_lr is None and tune == "z"
        else _choose_router_lr(router_lr, settings),
    }
    key = {"kind": "adapt", "skills": expert.digest, "task": read.digest, **numbers}
    run = checkpoint_folder(name, key)
    objective = MultiTask(make_objective(found, session.device), rows)
    pairs = [(0, objective.encode(read, e)) for e in examples]
    what = f"adapting to {read.reference}"
    loss = fit(model, objective, pairs, settings, run, what, session.report, numbers["router_lr"])
    if tune == "mu":
        save_lora(run / "expert", record, skilled, found)
    else:
        save_skills(run / "expert", record, skilled)
    training = {
        **numbers,
        "skills": expert.reference,
        "trainable": count_trainable(model),
        "loss": loss,
    }
    made = read.reference
    return describe(run / "expert", name, found, session, task=made, training=training)


def _choose_router_lr(given: float | None, settings: Settings) -> float:
    """Return the learning rate that was given, or ten times that of the skills."""
    return 10 * settings.lr if given is None else given


def parse_tune(word: str) -> Tune:
    """Check the value of `--tune`.

    Args:
        word: The value.

    Returns:
        The same value.

    Raises:
        UsageError: The value is unknown.
    """
    if word not in get_args(Tune):
        raise UsageError(f"unknown --tune {word!r}", f"use one of {', '.join(get_args(Tune))}")
    return cast(Tune, word)
