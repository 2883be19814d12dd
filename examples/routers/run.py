"""Train experts and gates, and score all routers on tasks that no expert was trained on.

Usage: python examples/routers/run.py PROOF.yaml [--seeds 0 1 2] [--experts-only]

Experts, gates and scores are stored as soon as they exist, so an interrupted run resumes. A recipe that
is added to the file later costs only its own column. Results are written next to the proof's file, one
JSON file per seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experthub import hub
from experthub.hub.errors import NotFoundError
from experthub.hub.evaluation.routing_map import map_routing
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_json
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.tasks.task import Example, Split, Task
from experthub.hub.tasks.task_files import read_task, write_task

SEEDS = (0, 1, 2)
PROMPTS = 16  # inputs of a task's test split for which the weights of routers are recorded
GATE = "gate"  # in a proof: the settings of gates; in a recipe: the key of these settings
SUITE = "routers"  # the suite of the tasks that this script creates


def short(task: str) -> str:
    """Return a short form of a task's name, for names of experts."""
    return task.rpartition(":")[2].replace("/", "-").replace("_", "-").lower()[:40].strip("-")


def say(text: str) -> None:
    """Print a line of progress to stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def report(what: str, done: int, size: int) -> None:
    """Print the end of a stage."""
    if size and done == size:
        say(f"  {what} {done}/{size}")


@dataclass
class Run:
    """One seed of a proof. It seeds the training of the experts and of their gates."""

    proof: dict[str, Any]
    seed: int
    known: dict[str, list[Expert]] = field(default_factory=dict)  # by the gates' key

    @property
    def tasks(self) -> list[str]:
        """The tasks that experts are trained on."""
        return list(self.proof["tasks"])

    @property
    def unseen(self) -> list[str]:
        """The tasks that no expert is trained on."""
        return [task for group in self.proof["unseen"].values() for task in group]

    def expert(self, task: str) -> str:
        """Return the expert of a task without gates, and train it first if it does not exist."""
        return self._trained(task, short(task), self._settings("train"))

    def _trained(self, task: str, what: str, settings: hub.Settings) -> str:
        name = f"{SUITE}-{self.proof['name']}-{what}-{self.seed}"
        try:
            return hub.Registry.read().find_expert(Reference.parse(f"{name}@1")).reference
        except NotFoundError:
            say(f"training {name}")
        return hub.train_lora(self.proof["base"], task, name, settings).reference

    def _settings(self, kind: str, **more: Any) -> hub.Settings:
        return hub.Settings(**{**self.proof[kind], "seed": self.seed, **more})

    def gated(self, task: str, gate: str = GATE) -> Expert:
        """Return the expert of a task with gates, and train the gates first if they do not exist.

        Args:
            task: The task.
            gate: The key in the proof of what differs from `gate`: settings, `start`, and `below`. If
                the first loss under `gate` is not below `below`, the gates are those of `gate`.
        """
        plain, more = self.expert(task), dict(self.proof[gate])
        start, below = more.pop("start", 0.5), more.pop("below", None)
        if below is not None:
            usual = self.gated(task)
            if usual.training[GATE]["loss"]["first"] >= below:
                return usual
        settings = self._settings(GATE, **more)
        wanted = {**asdict(settings), "start": start}
        for expert in hub.Registry.read().list_experts():
            found = {"start": 0.5, **{**expert.training}.get("gate", {})}
            same = {key: found.get(key) for key in wanted} == wanted
            if same and expert.name == plain.partition("@")[0]:
                return expert
        say(f"training the gates of {plain}")
        return hub.train_gate(plain, settings, start=start)

    def entries(self, gate: str = GATE) -> list[Expert]:
        """Return the experts in the order of the tasks: those that the proof names, or trained ones."""
        if gate not in self.known:
            self.known[gate] = self._given() or self._made(gate)
        return self.known[gate]

    def _given(self) -> list[Expert]:
        registry = hub.Registry.read()
        return [
            registry.find_expert(Reference.parse(name)) for name in self.proof.get("experts", ())
        ]

    def _made(self, gate: str) -> list[Expert]:
        for task in self.tasks:
            self.expert(task)
        return [self.gated(task, gate) for task in self.tasks]

    @property
    def experts(self) -> list[str]:
        return [expert.reference for expert in self.entries()]

    def recipe(self, body: Mapping[str, Any], experts: Sequence[str] | None = None) -> hub.Recipe:
        """Return a recipe of the proof: its merge or route, with the base and the experts."""
        experts = experts or [e.reference for e in self.entries(body.get(GATE, GATE))]
        method = {key: value for key, value in body.items() if key != GATE}
        common = {"base": self.proof["base"], "experts": list(experts)}
        return hub.Recipe.of({**common, **method, "seed": self.seed})

    def alone(self, expert: str) -> hub.Recipe:
        return self.recipe({"merge": {"method": "linear"}}, [expert])

    @property
    def recipes(self) -> dict[str, hub.Recipe]:
        return {name: self.recipe(body) for name, body in self.proof["recipes"].items()}

    def multi_task(self) -> str:
        """Return one expert trained on all tasks, with as many steps as all others together."""
        train = self._settings("train")
        examples = [
            own_choices(task, example)
            for task in map(read_task, self.tasks)
            for example in task.split("train", train.examples)
        ]
        card = read_task(self.tasks[0]).card
        card = card.model_copy(update={"name": f"mix-{self.proof['name']}", "labels": None})
        steps = train.steps * len(self.tasks)
        settings = self._settings("train", steps=steps, examples=len(examples))
        reference = write_task(SUITE, card, examples)
        return self._trained(reference, "mix", settings)

    def evaluated(
        self, recipes: Mapping[str, hub.Recipe], tasks: Sequence[str], split: Split, controls: bool
    ) -> dict[str, Any]:
        return hub.evaluate(
            recipes,
            tasks,
            split=split,
            limit=self.proof["limit" if split == "all" else "own_limit"],
            controls=controls,
            with_samples=True,
            session=hub.Session(report=report),
        )

    def on_unseen(self) -> dict[str, Any]:
        """Score every column and the controls on the unseen tasks, example by example."""
        own, others = {}, {}
        for name, recipe in self.recipes.items():
            (others if GATE in self.proof["recipes"][name] else own)[name] = recipe
        found = self.evaluated(own, self.unseen, "all", True)
        columns, controls = outcomes(found), found["controls"]
        if others:
            columns |= outcomes(self.evaluated(others, self.unseen, "all", False))
        return {"columns": columns, "controls": controls}

    def of_multi_task(self) -> dict[str, Any]:
        """Score the one expert of all tasks on the unseen tasks."""
        recipes = {"multi_task": self.alone(self.multi_task())}
        return outcomes(self.evaluated(recipes, self.unseen, "all", False))

    def on_own(self) -> dict[str, dict[str, float]]:
        """Return the accuracy on the test splits of the trained tasks, by column and task."""
        found = self.evaluated(self.recipes, self.tasks, "test", False)
        columns = accuracies(found)
        columns["individual"] = {
            task: accuracies(self.evaluated({"it": self.alone(expert)}, [task], "test", False))[
                "it"
            ][task]
            for expert, task in zip(self.experts, self.tasks, strict=True)
        }
        return columns

    def watched(self) -> dict[str, dict[str, list[float]]]:
        """Return the mean weight of every expert over tokens and modules, by recipe and task.

        The inputs come from the test splits of the trained tasks, and from the unseen tasks.
        """
        inputs = {task: held_out(task) for task in self.tasks} | {t: t for t in self.unseen}
        return {
            name: {task: self._weights(self.recipes[name], inputs[task]) for task in inputs}
            for name in self.proof["watched"]
        }

    def _weights(self, recipe: hub.Recipe, task: str) -> list[float]:
        layers = map_routing(recipe, [task], per_task=PROMPTS)["weights"]
        return [round(sum(row) / len(layers), 6) for row in zip(*layers, strict=True)]

    def training(self) -> dict[str, Any]:
        """Return the losses of the first and the last ten steps, for experts and for gates."""
        gates = dict.fromkeys(body.get(GATE, GATE) for body in self.proof["recipes"].values())
        return {
            task: {
                "loss": self.entries()[place].training.get("loss"),
                **{g: self.entries(g)[place].training.get(GATE, {}).get("loss") for g in gates},
            }
            for place, task in enumerate(self.tasks)
        }

    def all(self) -> dict[str, Any]:
        return {
            "proof": self.proof,
            "seed": self.seed,
            "experts": self.experts,
            "unseen": self.on_unseen(),
            "own": self.on_own(),
            "watched": self.watched(),
            "training": self.training(),
        }


def outcomes(result: dict[str, Any]) -> dict[str, Any]:
    """Return which examples were right, as ones and zeros, and the log-probability, by column and task."""
    right: dict[str, dict[str, str]] = {}
    for sample in result["samples"]:
        row = right.setdefault(sample["method"], {})
        row[sample["task"]] = row.get(sample["task"], "") + str(int(sample["right"]))
    return {
        name: {
            "right": right[name],
            "logprob": {r["task"]: r["methods"][name]["logprob"] for r in result["tasks"]},
        }
        for name in right
    }


def accuracies(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        name: {row["task"]: row["methods"][name]["accuracy"] for row in result["tasks"]}
        for name in result["average"]
    }


def own_choices(task: Task, example: Example) -> Example:
    """Return an example that holds its own choices, so that tasks can be mixed."""
    choices = task.list_choices(example)
    return Example(
        id=example.id, input=example.input, choices=choices, answer=task.find_answer(example)
    )


def held_out(reference: str) -> str:
    """Write the first test examples of a task as a new task, and return its reference."""
    task = read_task(reference)
    card = task.card.model_copy(update={"name": f"test-{short(reference)}"})
    return write_task(SUITE, card, task.split("test", PROMPTS))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("proof", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: those of the proof)")
    parser.add_argument("--experts-only", action="store_true")
    given = parser.parse_args()
    proof = yaml_files.read(given.proof).value
    runs = [Run(proof, seed) for seed in given.seeds or proof.get("seeds", SEEDS)]
    if given.experts_only:
        for run in runs:
            say(f"seed {run.seed}: {len(run.experts)} experts with gates")
        return
    found = {}
    for run in runs:
        found[run.seed] = run.all()
        write(given.proof, run, found[run.seed])
    # The expert of all tasks takes as long as all others, so it comes last for every seed.
    for run in runs if "train" in proof else ():
        found[run.seed]["unseen"]["columns"] |= run.of_multi_task()
        write(given.proof, run, found[run.seed])


def write(proof: Path, run: Run, found: dict[str, Any]) -> None:
    place = proof.with_name(f"{proof.stem}-{run.seed}.json")
    write_json(place, found)
    say(f"wrote {place}")


if __name__ == "__main__":
    main()
