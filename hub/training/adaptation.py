"""Adapt an inventory of skills to a new task with a few examples (MHR, MHR-z, MHR-mu)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal, cast, get_args

import torch
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.composition.skills import Inventory
from experthub.hub.errors import UsageError
from experthub.hub.files.spelling import check_choice
from experthub.hub.formats.safetensors_reader import Tensors
from experthub.hub.formats.skills import SKILLS, SkillsRecord
from experthub.hub.kinds import kinds
from experthub.hub.kinds.skills import INVENTORY
from experthub.hub.recipes.examples import choose_few
from experthub.hub.registry.content import Content
from experthub.hub.registry.entries import check_name
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.session import Session
from experthub.hub.tasks.task_files import read_task
from experthub.hub.training.fit import Settings, fit
from experthub.hub.training.inventory import (
    count_trainable,
    insert_skills,
    load_skills,
    save_lora,
    save_skills,
)
from experthub.hub.training.objectives import make_objective
from experthub.hub.training.skills import MultiTask, choose_router_lr
from experthub.hub.transfer.describe import create_checkpoint_folder, describe
from experthub.hub.transfer.pull import pull
from experthub.routing import BatchTasks, SkilledLinear

Tune = Literal["all", "z", "mu"]
Z_LR = 0.1  # The peak learning rate of a router that is trained alone.


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
    expert = session.registry.find_expert(Reference.parse(skills))
    if kinds[expert.kind] is not INVENTORY:
        raise UsageError(
            f"{expert.reference} is {kinds[expert.kind].label}, not an inventory of skills",
            "train an inventory with hub train skills",
        )
    pull(session, Content.from_expert(expert))
    read, found = read_task(task), find(expert.base, session)
    inventory = Inventory(expert.digest, store, Tensors(store.read(expert.digest, SKILLS)))
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", session.device)
    rows = BatchTasks()
    record, skilled = _insert_stored(model, inventory, read.reference, tune, rows)
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
        else choose_router_lr(router_lr, settings),
    }
    key = {"kind": "adapt", "skills": expert.digest, "task": read.digest, **numbers}
    run = create_checkpoint_folder(name, key)
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


def _insert_stored(
    model: Any, inventory: Inventory, task: str, tune: Tune, rows: BatchTasks
) -> tuple[SkillsRecord, dict[str, SkilledLinear]]:
    """Put stored skills beside a model, and make trainable what `tune` selects."""
    change: dict[str, Any] = {"tasks": [task]}
    if tune == "mu" or inventory.record.router == "shared":
        change |= {"router": "shared", "n_skills": 1, "n_heads": 1}
    record = inventory.record.model_copy(update=change)
    skilled = insert_skills(model, record, load_skills(inventory, record), rows, relaxed=False)
    for module in skilled.values():
        module.skill_a.requires_grad_(tune != "z")
        module.skill_b.requires_grad_(tune != "z")
        module.logits.requires_grad_(record.router != "shared")
    return record, skilled


def parse_tune(word: str) -> Tune:
    """Check the value of `--tune`.

    Args:
        word: The value.

    Returns:
        The same value.

    Raises:
        UsageError: The value is unknown.
    """
    check_choice(word, get_args(Tune), "--tune")
    return cast(Tune, word)
