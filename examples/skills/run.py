"""Train inventories of skills on several tasks together, and adapt them to other tasks with few examples.

Usage: python examples/skills/run.py examples/skills/encoder.yaml [--seeds 0 1 2]

Finished work is skipped: experts in $HUB_HOME, and results next to the study's file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experthub import hub
from experthub.hub.errors import NotFoundError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_json
from experthub.hub.files.memory import reuse_memory
from experthub.hub.registry.expert import Reference

SCRATCH = "lora"  # a LoRA trained only on the examples of the held-out task


def say(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """One seed of a study.

    Attributes:
        study: The content of the study's file.
        seed: The seed of training and of the choice of examples.
    """

    study: dict[str, Any]
    seed: int

    @property
    def base(self) -> str:
        return str(self.study["base"])

    def name(self, *parts: object) -> str:
        """Return the name of an expert.

        Args:
            *parts: The parts of the name between the study's name and the seed.

        Returns:
            The name, in lower case with hyphens.
        """
        text = "-".join(map(str, (self.study["name"], *parts, self.seed)))
        return text.lower().replace("/", "-").replace(":", "-").replace("_", "-")

    def made(self, name: str, make: Any) -> hub.Expert:
        """Return an expert from the registry, and train it first if it does not exist.

        Args:
            name: The name of the expert.
            make: The function that trains it.

        Returns:
            The expert.
        """
        registry = hub.Registry.read()
        try:
            return registry.find_expert(Reference.parse(name))
        except NotFoundError:
            say(f"training {name}")
            expert: hub.Expert = make()
            return expert

    def inventory(self, kind: str) -> hub.Expert:
        """Return the inventory that is trained on all tasks together.

        Args:
            kind: The name of the inventory in the study.

        Returns:
            The inventory.
        """
        name = self.name(kind)
        shape = hub.InventoryShape(**self.study["inventories"][kind], **self.study["shape"])
        settings = hub.Settings(**self.study["train"], seed=self.seed)
        return self.made(
            name, lambda: hub.train_skills(self.base, self.study["tasks"], name, shape, settings)
        )

    def adapted(self, kind: str, tune: str, shots: int, task: str) -> hub.Expert:
        """Return the expert that is adapted to one task with few examples.

        Args:
            kind: The name of the inventory, or `lora` for a LoRA without an inventory.
            tune: The part that is trained: `all`, `z` or `mu`.
            shots: The number of examples.
            task: The task.

        Returns:
            The expert.
        """
        name = self.name(kind, tune, shots, task.rpartition(":")[2])
        settings = hub.Settings(**self.study["adapt"], examples=shots, seed=self.seed)
        if kind == SCRATCH:
            rank = self.study["shape"]["rank"]
            return self.made(
                name, lambda: hub.train_lora(self.base, task, name, settings, rank=rank, alpha=rank)
            )
        skills, rate = self.inventory(kind).reference, self.study["router_lr"]
        return self.made(
            name,
            lambda: hub.adapt(skills, task, name, tune, settings, shots=shots, router_lr=rate),
        )

    def columns(self) -> Iterator[tuple[str, str]]:
        """Iterate over all pairs of an inventory and the part that is trained."""
        yield SCRATCH, "all"
        for kind, tunes in self.study["tune"].items():
            for tune in tunes:
                yield kind, tune

    def of_task(self, task: str) -> dict[str, Any]:
        """Score all ways of adapting on one held-out task.

        Args:
            task: The task.

        Returns:
            For each column, which examples were right, how many numbers were trained, and the peak
            learning rate of the router (None for `lora`).
        """
        recipes, trainable, router_lr = {}, {}, {}
        for kind in self.study["inventories"]:
            router = self.study["inventories"][kind]["router"]
            method = router if router in ("poly", "mhr") else "poly"
            route = {"method": method, "task": "average"}
            recipes[f"{kind} average"] = self.recipe(self.inventory(kind), route)
        for shots in self.study["shots"]:
            for kind, tune in self.columns():
                expert = self.adapted(kind, tune, shots, task)
                column = f"{kind} {tune} {shots}"
                method = kind if kind in ("poly", "mhr") else "poly"
                plain = expert.kind == "lora"
                recipes[column] = self.recipe(expert, {"method": "uniform" if plain else method})
                trainable[column] = expert.training.get("trainable")
                router_lr[column] = expert.training.get("router_lr")
        limit = self.study["limit"]
        found = hub.evaluate(recipes, [task], split="test", limit=limit, with_samples=True)
        right = dict.fromkeys(found["average"], "")
        for sample in found["samples"]:
            right[sample["method"]] += str(int(sample["right"]))
        return {"right": right, "trainable": trainable, "router_lr": router_lr}

    def recipe(self, expert: hub.Expert, route: dict[str, Any]) -> hub.Recipe:
        """Return a recipe with one expert.

        Args:
            expert: The expert.
            route: The `route:` of the recipe.

        Returns:
            The recipe.
        """
        return hub.Recipe.of({"base": self.base, "experts": [expert.reference], "route": route})

    def all(self) -> dict[str, Any]:
        """Score all held-out tasks."""
        tasks = {}
        for task in self.study["held_out"]:
            tasks[task] = self.of_task(task)
            right = tasks[task]["right"].items()
            say(f"{task}: { ({name: row.count('1') / len(row) for name, row in right}) }")
        return {"schema": 1, "study": self.study["name"], "seed": self.seed, "tasks": tasks}


def main() -> None:
    """Run the study for every seed that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    reuse_memory()
    study = yaml_files.read(given.study).value
    for seed in given.seeds:
        place = given.study.with_name(f"{given.study.stem}-{seed}.json")
        if not place.is_file():
            write_json(place, Run(study, seed).all())
            say(f"wrote {place}")


if __name__ == "__main__":
    main()
