"""Recipes with tiny experts, one for every router of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from conftest import run_hub, tiny_bert
from experthub import hub
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.merge import Strategy
from experthub.routing import routers
from torch import Tensor

SMALL = {"steps": 2, "examples": 4, "size": 8}
TASKS = ("made:animals", "made:colours")


def made_task(name: str, words: list[str]) -> str:
    """A task whose inputs are of a few words."""
    examples = []
    for number in range(60):
        text = " ".join(words[(number * 7 + i * 3) % len(words)] for i in range(4)) + f" {number}"
        choices = ["yes", "no"]
        key = example_id(text, choices)
        examples.append(Example(id=key, input=text, choices=choices, answer=number % 2))
    card = Card(name=name, source="made-up", template="{input}", labels=["yes", "no"])
    return write_task("made", card, examples)


def make_recipe(
    strategy: Strategy[Any], base: Path, make_expert: Callable[..., Path], folder: Path
) -> dict[str, Any]:
    """A recipe that offers what a router says that it needs.

    Args:
        strategy: A router of the catalogue.
        base: The folder of the tiny base.
        make_expert: A function that makes a random expert from a seed.
        folder: A folder for a tiny sentence encoder.
    """
    tasks = [made_task("animals", ["cat", "dog", "cow"]), made_task("colours", ["RED", "BLUE"])]
    options: dict[str, Any] = {k: v for k, v in SMALL.items() if k in strategy.options}
    if "embedder" in strategy.options:
        options["embedder"] = str(tiny_bert(folder / "encoder"))
    recipe: dict[str, Any] = {"base": str(base)}
    if "skills" in strategy.needs:
        shape = hub.InventoryShape(router=strategy.name, skills=2, rank=2)
        settings = hub.Settings(steps=2, batch_size=2)
        hub.train_skills(str(base), tasks, "inventory", shape, settings)
        recipe["experts"] = ["inventory"]
    else:
        names = [f"expert-{seed}" for seed in range(2)]
        for seed, (name, task) in enumerate(zip(names, tasks, strict=True)):
            words = ("--name", name, "--base", base, "--task", task)
            ran = run_hub("add", make_expert(seed), *words)
            assert ran.code == 0, ran.err
        recipe["experts"] = [{"expert": name, "weight": 0.2} for name in names]
    if strategy.needs_data:
        labels = strategy.needs_labels(strategy.bind(options))
        recipe["data"] = {"tasks": tasks, "labels": labels, "limit": 4}
    return recipe | {"route": {"method": strategy.name, **options}}


def is_by_task(recipe: dict[str, Any]) -> bool:
    """Tell whether the caller names the task of every row."""
    by_task: bool = routers[recipe["route"]["method"]].traits.routing.input == "task"
    return by_task


@contextmanager
def composed(recipe: dict[str, Any], device: str | None = None) -> Iterator[Any]:
    """Compose a recipe; a router by task is told the task of every row."""
    made = hub.compose(recipe, device=device)
    with name_task(made, recipe, 1):
        yield made


def name_task(
    composition: Any, recipe: dict[str, Any], number: int
) -> AbstractContextManager[None]:
    """Name one of the two tasks if the router is one by task."""
    if not is_by_task(recipe):
        return nullcontext()
    named: AbstractContextManager[None] = composition.tasks(TASKS[number % len(TASKS)])
    return named


def some_ids(count: int, length: int, seed: int = 3) -> Tensor:
    """Token ids `[count, length]` of letters and digits."""
    return torch.randint(5, 60, (count, length), generator=torch.Generator().manual_seed(seed))
