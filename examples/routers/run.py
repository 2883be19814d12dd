"""Routers on tasks that no expert was trained on: experts and gates trained, all routers scored.

Usage: python examples/routers/run.py PROOF.yaml [--seeds 0 1 2] [--experts-only]

Everything is kept as it is made (experts, gates, scores), so an interrupted run goes on, and a
recipe that is added to the file later costs its own column only.  Results are written beside the
proof's file, one JSON for each seed.
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
from experthub.hub.evaluation.routing_map import routing_map
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_json
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.tasks.task import Example, Split, Task, read_task, write_task

SEEDS = (0, 1, 2)
PROMPTS = 16  # of a task's test split, on which a router is watched
GATE = "gate"  # in a proof, how gates are trained; in a recipe, which of its keys says it
SUITE = "routers"  # of the tasks that are made here


def short(task: str) -> str:
    return task.rpartition(":")[2].replace("/", "-").replace("_", "-").lower()[:40].strip("-")


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def report(what: str, done: int, size: int) -> None:
    if size and done == size:
        say(f"  {what} {done}/{size}")


@dataclass
class Run:
    """One seed of a proof: that of its experts and of their gates."""

    proof: dict[str, Any]
    seed: int
    known: dict[str, list[Expert]] = field(default_factory=dict)  # by how gates are trained

    @property
    def tasks(self) -> list[str]:
        """Those that experts are trained on."""
        return list(self.proof["tasks"])

    @property
    def unseen(self) -> list[str]:
        return [task for group in self.proof["unseen"].values() for task in group]

    def expert(self, task: str) -> str:
        """The expert of a task, without gates, trained unless it is there."""
        return self._trained(task, short(task), self._settings("train"))

    def _trained(self, task: str, what: str, settings: hub.Settings) -> str:
        name = f"{SUITE}-{self.proof['name']}-{what}-{self.seed}"
        try:
            return hub.Registry.read().expert(Reference.parse(f"{name}@1")).reference
        except NotFoundError:
            say(f"training {name}")
        return hub.train_lora(self.proof["base"], task, name, settings).reference

    def _settings(self, kind: str, **more: Any) -> hub.Settings:
        return hub.Settings(**{**self.proof[kind], "seed": self.seed, **more})

    def gated(self, task: str, gate: str = GATE) -> Expert:
        """The expert of a task with gates that were trained as the proof says.

        gate: the key of the proof that says it, in what it differs from `gate`: settings, `start`, and
        `below`, the loss of `gate` at its start from which on gates are as in `gate`.
        """
        plain, more = self.expert(task), dict(self.proof[gate])
        start, below = more.pop("start", 0.5), more.pop("below", None)
        if below is not None:
            usual = self.gated(task)
            if usual.training[GATE]["loss"]["first"] >= below:
                return usual
        settings = self._settings(GATE, **more)
        wanted = {**asdict(settings), "start": start}
        for expert in hub.Registry.read().experts():
            found = {"start": 0.5, **{**expert.training}.get("gate", {})}
            same = {key: found.get(key) for key in wanted} == wanted
            if same and expert.name == plain.partition("@")[0]:
                return expert
        say(f"training the gates of {plain}")
        return hub.train_gate(plain, settings, start=start)

    def entries(self, gate: str = GATE) -> list[Expert]:
        """In the order of the tasks, those that the proof names, or its own: first all, then all gates."""
        if gate not in self.known:
            self.known[gate] = self._given() or self._made(gate)
        return self.known[gate]

    def _given(self) -> list[Expert]:
        registry = hub.Registry.read()
        return [registry.expert(Reference.parse(name)) for name in self.proof.get("experts", ())]

    def _made(self, gate: str) -> list[Expert]:
        for task in self.tasks:
            self.expert(task)
        return [self.gated(task, gate) for task in self.tasks]

    @property
    def experts(self) -> list[str]:
        return [expert.reference for expert in self.entries()]

    def recipe(self, body: Mapping[str, Any], experts: Sequence[str] | None = None) -> hub.Recipe:
        """A recipe of the proof: its merge or route, with the base and the experts."""
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
        """One expert of all tasks, of the examples that the others are trained on, mixed.

        With as many steps as all of them together.
        """
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
            report=report,
        )

    def on_unseen(self) -> dict[str, Any]:
        """Every column, the controls among them, example by example."""
        own, others = {}, {}
        for name, recipe in self.recipes.items():
            (others if GATE in self.proof["recipes"][name] else own)[name] = recipe
        found = self.evaluated(own, self.unseen, "all", True)
        columns, controls = outcomes(found), found["controls"]
        if others:
            columns |= outcomes(self.evaluated(others, self.unseen, "all", False))
        return {"columns": columns, "controls": controls}

    def of_multi_task(self) -> dict[str, Any]:
        """The column of the one expert of all tasks."""
        recipes = {"multi_task": self.alone(self.multi_task())}
        return outcomes(self.evaluated(recipes, self.unseen, "all", False))

    def on_own(self) -> dict[str, dict[str, float]]:
        """Accuracy on the test splits of the trained tasks, by column and task."""
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
        """The weights that routers give, by recipe and task: every expert's mean, in their order.

        Over tokens and modules, on inputs of the test splits of the trained tasks, and of the unseen.
        """
        inputs = {task: held_out(task) for task in self.tasks} | {t: t for t in self.unseen}
        return {
            name: {task: self._weights(self.recipes[name], inputs[task]) for task in inputs}
            for name in self.proof["watched"]
        }

    def _weights(self, recipe: hub.Recipe, task: str) -> list[float]:
        layers = routing_map(recipe, [task], per_task=PROMPTS)["weights"]
        return [round(sum(row) / len(layers), 6) for row in zip(*layers, strict=True)]

    def training(self) -> dict[str, Any]:
        """Losses of the first and the last ten steps, of experts and of gates."""
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
    """By column and task: which examples were right, as ones and noughts, and the log-probability."""
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
    """An example with its choices beside it, so that tasks can be mixed."""
    choices = task.choices(example)
    return Example(id=example.id, input=example.input, choices=choices, answer=task.answer(example))


def held_out(reference: str) -> str:
    """The first test examples of a task, as a task of its own."""
    task = read_task(reference)
    card = task.card.model_copy(update={"name": f"test-{short(reference)}"})
    return write_task(SUITE, card, task.split("test", PROMPTS))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("proof", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the proof by default")
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
    # The expert of all tasks takes as long as all others: last, for every seed.
    for run in runs if "train" in proof else ():
        found[run.seed]["unseen"]["columns"] |= run.of_multi_task()
        write(given.proof, run, found[run.seed])


def write(proof: Path, run: Run, found: dict[str, Any]) -> None:
    place = proof.with_name(f"{proof.stem}-{run.seed}.json")
    write_json(place, found)
    say(f"wrote {place}")


if __name__ == "__main__":
    main()
