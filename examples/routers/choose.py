"""Find tasks that can be learned: train one expert briefly per candidate, and score it next to its base.

Usage: python examples/routers/choose.py PROOF.yaml CANDIDATES.txt [--base-only]

Scores come from the validation splits, so that neither test splits nor routers influence the choice.
An interrupted run resumes where it stopped. The numbers are written next to the proof's file.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from experthub import hub
from experthub.hub.errors import HubError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_json
from experthub.hub.tasks.task import Split
from experthub.hub.tasks.task_files import read_task
from run import Run, say

EXAMPLES = 150
STAND_IN = "bigbench:intent_recognition"


def tried(run: Run, name: str, base_only: bool) -> dict[str, Any]:
    """Score the base and, unless `base_only` is set, the expert on a task.

    Args:
        run: The run that trains the experts.
        name: The name of the task in BIG-bench.
        base_only: Whether to score only the base, on all splits.

    Returns:
        The scores and a description of the task.
    """
    task, split = f"bigbench:{name}", "all" if base_only else "validation"
    # An evaluation needs a recipe, so another expert stands in; only the base's column is kept.
    expert = run.expert(STAND_IN if base_only else task)
    found = hub.evaluate({"it": run.alone(expert)}, [task], split=split, limit=EXAMPLES)
    row = found["tasks"][0]
    result = described(task, split) | {"base": row["methods"]["base"]["accuracy"]}
    if base_only:
        return result
    it = row["methods"]["it"]
    return result | {"expert": it["accuracy"], "delta_ci95": it["delta_to_base"]["ci95"]}


def described(reference: str, split: Split) -> dict[str, Any]:
    """Describe the examples of a split.

    Args:
        reference: The task.
        split: The split.

    Returns:
        The number of examples, the accuracy of guessing, and the share of the most common answer
        if all examples have the same choices.
    """
    task = read_task(reference)
    examples = task.split(split, EXAMPLES)
    choices = [task.list_choices(example) for example in examples]
    answers = Counter(c[task.find_answer(e) or 0] for c, e in zip(choices, examples, strict=True))
    shared = len(set(map(frozenset, choices))) == 1
    return {
        "source": task.card.source,
        "n": len(examples),
        "chance": sum(1 / len(c) for c in choices) / len(examples),
        "most_common": max(answers.values()) / len(examples) if shared else None,
    }


def main() -> None:
    """Score every candidate that has no score yet, and write the numbers after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("proof", type=Path)
    parser.add_argument("candidates", type=Path)
    parser.add_argument("--base-only", action="store_true")
    given = parser.parse_args()
    run = Run(yaml_files.read(given.proof).value, 0)
    place = given.proof.with_name(f"{given.proof.stem}-{given.candidates.stem}.json")
    known: dict[str, Any] = json.loads(place.read_text()) if place.is_file() else {}
    for name in given.candidates.read_text().split():
        if name not in known:
            try:
                known[name] = tried(run, name, given.base_only)
            except HubError as error:
                known[name] = {"error": error.message}
            say(f"{name}: {known[name]}")
            write_json(place, known)


if __name__ == "__main__":
    main()
