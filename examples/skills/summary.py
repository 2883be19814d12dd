"""The section on skills of docs/results.md, from the results of their runs.

examples/suite/table.py puts it behind the others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experthub.hub.evaluation.statistics import hierarchical

HERE = Path(__file__).parent
HEAD = """## Skills: adapting to a new task by few examples ({name})

Inventories trained on {tasks} tasks together, then adapted to {held_out} others; accuracy on at most {limit} examples of their test
splits, in the mean of the tasks; mean over seeds {seeds}, and the standard deviation between them. `average`: the
skills' mean, with no example of the task. `z`: the router's numbers alone are trained; `mu`: the average of the skills alone;
`lora all`: a LoRA of the same rank from the examples alone, as many numbers as `shared mu`. Trainable: how many numbers are.
`make skills-encoder`; all settings in `examples/skills/{name}.yaml`.
"""
COMPARED = """The ways that the papers compare. The intervals are the paired bootstrap's, 95 %, over tasks and examples, of the mean over seeds;
there are few tasks, so they are rather too narrow.
"""
RESAMPLES = 2000


def results(folder: Path = HERE) -> dict[str, list[dict[str, Any]]]:
    """The runs of all seeds by the study's name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-[0-9].json")):
        run = json.loads(path.read_text())
        found.setdefault(run["study"], []).append(run)
    return found


def right(run: dict[str, Any], column: str, task: str) -> list[int]:
    return [int(one) for one in run["tasks"][task]["right"][column]]


def cell(runs: Sequence[dict[str, Any]], column: str) -> str:
    """Mean over seeds of the mean over tasks, and the deviation between seeds."""
    means = [mean(mean(right(run, column, task)) for task in run["tasks"]) for run in runs]
    spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
    return f"{mean(means):.3f}{spread}"


def table(runs: Sequence[dict[str, Any]], study: dict[str, Any]) -> list[str]:
    """A row for each way, a column for each number of examples."""
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
    """The difference of two columns, with its interval."""
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
    low, high = hierarchical(differences, resamples=RESAMPLES)
    return f"{mean(map(mean, differences)):+.3f} ({low:+.3f}..{high:+.3f})"


def comparisons(runs: Sequence[dict[str, Any]], study: dict[str, Any]) -> list[str]:
    shots = study["shots"]
    lines = [f"| | {' | '.join(map(str, shots))} |", f"| --- |{' ---: |' * len(shots)}"]
    for way, other in study["compared"]:
        cells = [minus(runs, f"{way} {count}", f"{other} {count}") for count in shots]
        lines.append(f"| {way} - {other} | {' | '.join(cells)} |")
    return [COMPARED, *lines, ""]


def lines(folder: Path = HERE) -> list[str]:
    from experthub.hub.files import yaml_files

    found = []
    for name, runs in results(folder).items():
        study: dict[str, Any] = yaml_files.read(folder / f"{name}.yaml").value
        head = HEAD.format(
            name=name,
            tasks=len(study["tasks"]),
            held_out=len(study["held_out"]),
            limit=study["limit"],
            seeds=", ".join(str(run["seed"]) for run in runs),
        )
        found += [head, *table(runs, study), *comparisons(runs, study)]
    return found
