"""Write the section on skills of docs/results.md from the results of their runs.

`examples/suite/table.py` appends it to the other sections.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experthub.hub.evaluation.statistics import bootstrap_groups

HERE = Path(__file__).parent
HEAD = """## Skills: adapting to a new task with few examples ({name})

An inventory is a set of LoRAs, called skills, that are trained together on several tasks. Its router mixes the skills
for each task. The inventories were trained on {tasks} tasks together and then adapted to {held_out} other tasks.

- The values are accuracies on at most {limit} examples of each test split, averaged over the {held_out} tasks.
- Each value is the mean over seeds {seeds}. The number after ± is the standard deviation between seeds.
- The header of a column is the number of examples used to adapt. The last column counts the trained numbers.
- The kind of inventory comes first in a row's name. `shared` is one LoRA for all tasks, `private` one LoRA per task.
- `make skills-encoder` computes the results. All settings are in `examples/skills/{name}.yaml`.

| row | what is trained |
| --- | --- |
| `average` | nothing: the mean of the skills, without an example of the task |
| `all` | the skills and the router |
| `z` | only the router's numbers, at a peak learning rate of {router_lr} (the default of `hub train adapt --tune z` is 0.1) |
| `mu` | only the average of the skills |
| `lora all` | a LoRA of the same rank, from the examples alone; it has as many numbers as `shared mu` |
"""
COMPARED = """The next table shows the differences that the papers compare. The intervals are 95 % intervals of the paired bootstrap
over tasks and examples, for the mean over seeds. There are few tasks, so the intervals are rather too narrow.
"""
RESAMPLES = 2000


def results(folder: Path = HERE) -> dict[str, list[dict[str, Any]]]:
    """Read the runs of all seeds, by the name of the study."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-[0-9].json")):
        run = json.loads(path.read_text())
        found.setdefault(run["study"], []).append(run)
    return found


def right(run: dict[str, Any], column: str, task: str) -> list[int]:
    """Return 1 or 0 for each example of a task: whether a column was right."""
    return [int(one) for one in run["tasks"][task]["right"][column]]


def cell(runs: Sequence[dict[str, Any]], column: str) -> str:
    """Format the accuracy averaged over tasks and seeds, with the standard deviation between seeds."""
    means = [mean(mean(right(run, column, task)) for task in run["tasks"]) for run in runs]
    spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
    return f"{mean(means):.3f}{spread}"


def table(runs: Sequence[dict[str, Any]], study: dict[str, Any]) -> list[str]:
    """Return the table with a row per way of adapting and a column per number of examples."""
    first = next(iter(runs[0]["tasks"].values()))
    shots = [str(count) for count in study["shots"]]
    lines = [f"| | 0 | {' | '.join(shots)} | trainable |", f"| --- |{' ---: |' * (len(shots) + 2)}"]
    lines.append(f"| zero-shot | {cell(runs, 'base')} |{' |' * (len(shots) + 1)}")
    for kind in study["inventories"]:
        lines.append(
            f"| {kind} average | {cell(runs, f'{kind} average')} |{' |' * (len(shots) + 1)}"
        )
    ways = dict.fromkeys(name.rpartition(" ")[0] for name in first["trainable"])
    for way in ways:
        cells = [cell(runs, f"{way} {count}") for count in shots]
        trainable = first["trainable"][f"{way} {shots[0]}"]
        count = "" if trainable is None else f"{trainable:,}"
        lines.append(f"| {way} | | {' | '.join(cells)} | {count} |")
    return [*lines, ""]


def minus(runs: Sequence[dict[str, Any]], column: str, other: str) -> str:
    """Format the difference of two columns, with its interval."""
    differences = [
        [
            mean(a - b for a, b in example)
            for example in zip(
                *(zip(right(r, column, task), right(r, other, task), strict=True) for r in runs),
                strict=True,
            )
        ]
        for task in runs[0]["tasks"]
    ]
    low, high = bootstrap_groups(differences, resamples=RESAMPLES)
    return f"{mean(map(mean, differences)):+.3f} ({low:+.3f}..{high:+.3f})"


def comparisons(runs: Sequence[dict[str, Any]], study: dict[str, Any]) -> list[str]:
    """Return the table of the differences that the study compares."""
    shots = study["shots"]
    lines = [f"| | {' | '.join(map(str, shots))} |", f"| --- |{' ---: |' * len(shots)}"]
    for way, other in study["compared"]:
        cells = [minus(runs, f"{way} {count}", f"{other} {count}") for count in shots]
        lines.append(f"| {way} - {other} | {' | '.join(cells)} |")
    return [COMPARED, *lines, ""]


def lines(folder: Path = HERE) -> list[str]:
    """Return the lines of the sections of all studies."""
    from experthub.hub.files import yaml_files

    found = []
    for name, runs in results(folder).items():
        study: dict[str, Any] = yaml_files.read(folder / f"{name}.yaml").value
        head = HEAD.format(
            name=name,
            tasks=len(study["tasks"]),
            held_out=len(study["held_out"]),
            limit=study["limit"],
            router_lr=study["router_lr"],
            seeds=", ".join(str(run["seed"]) for run in runs),
        )
        found += [head, *table(runs, study), *comparisons(runs, study)]
    return found
