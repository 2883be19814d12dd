"""Compare settings for training gates, that is steps and learning rates, on a few experts.

Usage: python examples/routers/gates.py PROOF.yaml [--experts 6] [--steps 30 100] [--lr 5e-3 2e-2]

Gates are judged on the validation splits of the experts' own tasks. The criteria are how often a router
finds the task's own expert, and the accuracy. The numbers are written next to the proof's file.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_json
from run import Run, accuracies, say
from summary import hits


def judged(proof: dict[str, Any], steps: int, lr: float) -> dict[str, Any]:
    """Train the gates with one setting and judge them.

    Args:
        proof: The content of the proof's file.
        steps: The number of steps.
        lr: The learning rate.

    Returns:
        The setting, the losses, the places of the own experts, and the accuracies.
    """
    run = Run({**proof, "gate": {**proof["gate"], "steps": steps, "lr": lr}}, 0)
    seen = {"proof": run.proof, "watched": run.watched()}
    columns = accuracies(run.evaluated(run.recipes, run.tasks, "validation", False))
    return {
        "steps": steps,
        "lr": lr,
        "loss": {task: record["gate"] for task, record in run.training().items()},
        "hits": {name: placed(seen, name) for name in run.recipes},
        "accuracy": columns,
    }


def placed(seen: dict[str, Any], name: str) -> dict[str, dict[str, float]]:
    """Return the weight and the place of each task's own expert under a router.

    Args:
        seen: The proof and the weights that its routers give.
        name: The name of the router's recipe.

    Returns:
        Weight and place, by task.
    """
    return {task: {"weight": w, "place": p} for task, (w, p) in hits(seen, name).items()}


def main() -> None:
    """Judge every combination of settings, and write the numbers after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("proof", type=Path)
    parser.add_argument("--experts", type=int, default=6)
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 100])
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-3, 2e-2])
    given = parser.parse_args()
    proof = yaml_files.read(given.proof).value
    proof["tasks"] = proof["tasks"][: given.experts]
    proof["unseen"] = {}
    proof["recipes"] = {name: proof["recipes"][name] for name in proof["watched"]}
    found = []
    for steps, lr in product(given.steps, given.lr):
        found.append(judged(proof, steps, lr))
        for name, rows in found[-1]["hits"].items():
            weight = mean(hit["weight"] for hit in rows.values())
            first = mean(hit["place"] == 1 for hit in rows.values())
            accuracy = mean(found[-1]["accuracy"][name].values())
            say(f"{steps} steps at {lr}: {name} {weight:.3f}, {first:.3f}, {accuracy:.3f}")
        write_json(given.proof.with_name(f"{given.proof.stem}-gates.json"), found)


if __name__ == "__main__":
    main()
