"""Train experts on real tasks, merge them by every method, and score the merges.

Usage: python examples/suite/run.py SUITE.yaml [--seeds 0 1 2] [--kinds full lora]

Experts, coefficients and scores are stored as soon as they exist, so an interrupted run resumes.
Results are written next to the suite's file, one JSON file per kind of expert and seed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experthub import hub
from experthub.hub.errors import NotFoundError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_json
from experthub.hub.formats.coefficients import COEFFICIENTS, COEFFICIENTS_JSON
from experthub.hub.registry.expert import Reference
from experthub.hub.states.run_state import state_folder
from experthub.hub.tasks.task import Example, example_id
from experthub.hub.tasks.task_files import read_task, write_task

HERE = Path(__file__).parent
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
SHOTS = (1, 2, 4, 8, 16)
TYPOS = 0.15  # share of words of a corrupted text in which two letters are swapped
Recipe = dict[str, Any]


def short(task: str) -> str:
    """Return a short form of a task's name, for names of experts."""
    return task.rpartition(":")[2].replace("/", "-").replace("_", "-").lower()[:40].strip("-")


def say(text: str) -> None:
    """Print a line of progress to stderr."""
    sys.stderr.write(f"{text}\n")


def report(what: str, done: int, size: int) -> None:
    if size and done in (1, size):
        say(f"  {what} {done}/{size}")


@dataclass
class Run:
    """One kind of expert and one seed of a suite."""

    suite: dict[str, Any]
    kind: str
    seed: int

    @property
    def base(self) -> str:
        """The name of the base, or its folder, which is relative to the suite's file."""
        name = str(self.suite["base"])
        return str((HERE / name).resolve()) if name.startswith(".") else name

    @cached_property
    def experts(self) -> list[str]:
        return [self._expert(task) for task in self.suite["tasks"]]

    def _expert(self, task: str, steps: int | None = None) -> str:
        """Return the expert of a task, and train it first if it does not exist."""
        name = f"suite-{short(task)}-{self.kind}-{self.seed}"
        try:
            return hub.Registry.read().find_expert(Reference.parse(name)).reference
        except NotFoundError:
            say(f"training {name}")
        train = self.suite["train"]
        settings = hub.Settings(
            steps=steps or train["steps"],
            examples=train["examples"] if steps is None else 10**6,
            batch_size=train["batch_size"],
            lr=train["full_lr" if self.kind == "full" else "lora_lr"],
            seed=self.seed,
        )
        if self.kind == "full":
            return hub.train_full(self.base, task, name, settings).expert.reference
        return hub.train_lora(self.base, task, name, settings).reference

    def recipe(self, method: str, experts: Sequence[str] | None = None, **options: Any) -> Recipe:
        data = options.pop("data", None)
        found: Recipe = {
            "base": self.base,
            "experts": list(experts or self.experts),
            "merge": {"method": method, **options},
            "seed": self.seed,
        }
        return found | ({"data": data} if data else {})

    def data(self, split: str, labels: bool = False, **more: Any) -> dict[str, Any]:
        return {"tasks": list(self.suite["tasks"]), "split": split, "labels": labels, **more}

    def columns(self) -> dict[str, Recipe]:
        """Return the recipes that merge the suite's experts, by name."""
        few = self.data("train", limit=self.suite["learn"]["statistics"])
        return {
            "average": self.recipe("linear"),
            "task_arithmetic": self.best("task_arithmetic"),
            "ties": self.best("ties"),
            **self.learned(),
            "regmean": self.recipe("regmean", data=few),
            "regmean_plusplus": self.recipe("regmean_plusplus", data=few),
            "multi_task": self.recipe("linear", [self._multi_task()]),
        }

    def learned(self) -> dict[str, Recipe]:
        """Return the recipes that learn coefficients."""
        learn = self.suite["learn"]
        unlabelled = self.data("test", limit=self.suite["limit"])
        ada = {k: learn[k] for k in ("steps", "lr", "batch_size")} | {"data": unlabelled}
        labelled = self.data("train", labels=True, limit=learn["labelled"])
        addition = {
            "steps": learn["steps"],
            "lr": learn["atlas_lr"],
            "batch_size": learn["batch_size"],
        }
        return {
            "adamerging_task": self.recipe("adamerging", granularity="task", **ada),
            "adamerging_layer": self.recipe("adamerging", **ada),
            "adamerging_plus_plus": self.recipe("adamerging", plus_plus=True, **ada),
            "atlas_task_addition": self.recipe(
                "atlas", setting="task_addition", data=labelled, **addition
            ),
        }

    def keep_coefficients(self, folder: Path) -> None:
        """Copy the learned coefficients to a folder next to the results."""
        for name, recipe in self.learned().items():
            found = state_folder(hub.resolve(hub.Recipe.of(recipe)))
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file in (COEFFICIENTS, COEFFICIENTS_JSON):
                shutil.copy(found / file, folder / name)

    def best(self, method: str) -> Recipe:
        """Return a method with the scale that is best on the validation splits."""
        recipes = {f"scale-{s}": self.recipe(method, scale=s) for s in SCALES}
        limit = self.suite["learn"]["validation"]
        found = self.scores(recipes, self.suite["tasks"], "validation", limit)
        average = {name: sum(row.values()) / len(row) for name, row in found.items()}
        chosen = max(recipes, key=lambda name: average[name])
        say(f"{method}: {chosen} of {average}")
        return recipes[chosen]

    def _multi_task(self) -> str:
        """Return one expert trained on the mixed examples of all tasks."""
        reference = f"suite:mix-{short(self.suite['name'])}"
        train = self.suite["train"]
        examples = [
            example
            for task in self.suite["tasks"]
            for example in map(plain(task), read_task(task).split("train", train["examples"]))
        ]
        card = read_task(self.suite["tasks"][0]).card
        card = card.model_copy(update={"name": reference.partition(":")[2], "labels": None})
        write_task("suite", card, examples)
        return self._expert(reference, train["steps"] * len(self.suite["tasks"]))

    def individual(self, tasks: Sequence[str]) -> dict[str, float]:
        """Score every expert on its own task."""
        return {
            task: self.scores({"it": self.recipe("linear", [expert])}, [task])["it"][task]
            for expert, task in zip(self.experts, tasks, strict=True)
        }

    def few_shot(self) -> dict[str, Any]:
        """Score aTLAS and LoraHub on tasks outside of the suite, by the number of examples per class."""
        found: dict[str, Any] = {}
        for task in self.suite["few_shot"]:
            for k in SHOTS:
                data = {"tasks": [task], "split": "train", "labels": True, "shots": k}
                recipes = {"atlas": self.recipe("atlas", data=data, patience=0)}
                if self.kind == "lora":
                    recipes["lorahub"] = self.recipe("lorahub", data=data)
                for name, row in self.scores(recipes, [task]).items():
                    found.setdefault(task, {}).setdefault(name, {})[str(k)] = row[task]
        return found

    def scores(
        self,
        recipes: dict[str, Recipe],
        tasks: Sequence[str],
        split: str = "test",
        limit: int | None = None,
    ) -> dict[str, dict[str, float]]:
        """Return the accuracy by column and task; the column `base` is the base."""
        made = {name: hub.Recipe.of(recipe) for name, recipe in recipes.items()}
        result = hub.evaluate(
            made,
            list(tasks),
            split=split,
            limit=limit or self.suite["limit"],
            session=hub.Session(report=report),
        )
        names = ["base", *recipes]
        return {
            name: {row["task"]: row["methods"][name]["accuracy"] for row in result["tasks"]}
            for name in names
        }

    def all(self) -> dict[str, Any]:
        tasks, unseen = list(self.suite["tasks"]), list(self.suite["unseen"])
        columns = self.columns()
        damaged = [corrupted(task) for task in tasks]
        found = {
            "suite": self.suite,
            "kind": self.kind,
            "seed": self.seed,
            "tasks": self.scores(columns, tasks) | {"individual": self.individual(tasks)},
            "corrupted": self.scores(columns, damaged, "all")
            | {"individual": self.individual(damaged)},
            "unseen": self.scores(columns, unseen),
            "few_shot": self.few_shot(),
        }
        chosen = ("task_arithmetic", "ties")
        return found | {"scales": {n: columns[n]["merge"]["scale"] for n in chosen}}


def plain(reference: str) -> Callable[[Example], Example]:
    """Return a function that gives an example of a task its own choices, so that tasks can be mixed."""
    task = read_task(reference)

    def of(example: Example) -> Example:
        choices = task.list_choices(example)
        return Example(
            id=example.id, input=example.input, choices=choices, answer=task.find_answer(example)
        )

    return of


def corrupted(reference: str) -> str:
    """Write a task's test examples with typing errors or blurred images as a new task."""
    task = read_task(reference)
    change = blurred if reference.startswith("vision:") else with_typos
    name = f"corrupted-{short(reference)}"
    examples = []
    for example in map(plain(reference), task.split("test")):
        text = change(example.input, random.Random(example.id))
        made = example_id(text, example.choices or ())
        examples.append(example.model_copy(update={"id": made, "input": text}))
    card = task.card.model_copy(update={"name": name})
    return write_task("suite", card, examples)


def with_typos(text: str, chance: random.Random) -> str:
    """Swap two neighbouring inner letters in some words."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and chance.random() < TYPOS:
            at = chance.randrange(1, len(word) - 2)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def blurred(text: str, chance: random.Random) -> str:
    """Blur an image in base64."""
    from PIL import ImageFilter
    from vision import drawn, in_base64

    return in_base64(drawn(text).filter(ImageFilter.GaussianBlur(1)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("suite", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    given = parser.parse_args()
    suite = yaml_files.read(given.suite).value
    for seed in given.seeds:
        for kind in given.kinds:
            place = given.suite.with_name(f"{given.suite.stem}-{kind}-{seed}.json")
            if not place.is_file():
                write_json(place, Run(suite, kind, seed).all())
                say(f"wrote {place}")
            Run(suite, kind, seed).keep_coefficients(HERE / "coefficients" / place.stem)


if __name__ == "__main__":
    main()
