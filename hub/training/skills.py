"""Train an inventory of skills on several tasks (Poly, MHR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.errors import HubError, UsageError
from experthub.hub.registry.entries import check_name
from experthub.hub.registry.expert import Expert
from experthub.hub.session import Session
from experthub.hub.tasks.task import Example, Task
from experthub.hub.tasks.task_files import read_task
from experthub.hub.training.fit import Settings, fit
from experthub.hub.training.inventory import (
    InventoryShape,
    count_trainable,
    initialise_skills,
    insert_skills,
    save_skills,
)
from experthub.hub.training.objectives import Objective, find_frozen, make_objective
from experthub.hub.transfer.describe import create_checkpoint_folder, describe
from experthub.merge import find_weight_reads
from experthub.routing import BatchTasks
from torch import Tensor, nn


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
    router_lr = choose_router_lr(router_lr, settings)
    numbers = {**asdict(shape), **asdict(settings), "router_lr": router_lr}
    key = {
        "kind": "skills",
        "base": found.digest,
        "tasks": [t.digest for t in read],
        **numbers,
    }
    run = create_checkpoint_folder(name, key)
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


def find_linears(model: Any, base: Base) -> list[str]:
    """List the linear modules that get skills: those that the model calls, without the output layer.

    The frozen heads get none, either.

    Args:
        model: The model of the base.
        base: The base.

    Returns:
        The paths of the modules, in the model's order.

    Raises:
        HubError: There is no such module, or the model has an encoder and a decoder.
    """
    # Its decoder reads a row for each choice, while the tasks are those of the examples.
    if model.config.is_encoder_decoder:
        raise HubError(
            f"{base.name} is an encoder-decoder model, which cannot get skills",
            "use a causal language model, an encoder, a classifier, CLIP or SigLIP",
        )
    head = model.get_output_embeddings() if base.is_causal else None
    never, uncalled = find_frozen(model, base), find_weight_reads(model)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in uncalled
        if not name.startswith(never)
    ]
    if not found:
        raise HubError(
            f"{base.name} has no linear module that can get skills",
            "use a base whose layers are nn.Linear",
        )
    return found


def choose_router_lr(given: float | None, settings: Settings) -> float:
    """Choose the peak learning rate of a router.

    Args:
        given: The requested learning rate, or None.
        settings: The settings of the training.

    Returns:
        The requested learning rate, or ten times that of the skills.
    """
    return 10 * settings.lr if given is None else given
