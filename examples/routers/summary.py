"""The section on routers of docs/results.md, from the results of their runs.

examples/suite/table.py puts it behind the suites' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experthub.hub.evaluation.statistics import bootstrap, hierarchical

HERE = Path(__file__).parent
RESAMPLES = 2000
BASE, BEST, ORACLE, MERGED = "base", "best_individual", "oracle", "merged"
LABELS = {
    BASE: "zero-shot",
    MERGED: "merged (mean of all experts)",
    BEST: "best individual expert",
    ORACLE: "oracle (best expert of each task)",
    "multi_task": "multi-task training",
}
HEAD = """## Routers on unseen tasks: {title}

{experts} experts with gates, {unseen} tasks that none of them was trained on, {near} of them near the trained ones: the same dataset,
or the same question about other inputs. Accuracy on at most {limit} examples of each, all splits, in the mean of the tasks;
{seeds}. The intervals are the paired bootstrap's, 95 %, over tasks
and examples, of the mean over seeds. A task is won or lost where its own interval leaves out zero, tied otherwise. `best
individual` and `oracle` are picked by the very scores that are shown, so they flatter. `make routers-{name}`; recipes and tasks
in `examples/routers/{name}.yaml`.
"""
SPREAD = "mean over seeds {seeds}, and the standard deviation between them"
ONE = "one seed, as these experts have one"
CHOSEN = """### Whom routers choose on unseen tasks

Accuracy, on the unseen tasks, of the one expert alone that a router gives the largest mean weight on {prompts} inputs.
"""
OWN = """### On the experts' own tasks

Accuracy on at most {limit} examples of the test splits, mean over seeds. Behind it what a router makes of {prompts} of these inputs:
the mean weight over tokens and modules of the task's own expert, and its place among the {experts} by that weight.
"""
PROMPTS = 16
Runs = Sequence[dict[str, Any]]


def results(folder: Path = HERE) -> dict[str, list[dict[str, Any]]]:
    """The runs of all seeds by the proof's name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-[0-9].json")):
        run = json.loads(path.read_text())
        found.setdefault(run["proof"]["name"], []).append(run)
    return found


def right(run: dict[str, Any], column: str, task: str) -> list[int]:
    return [int(one) for one in run["unseen"]["columns"][column]["right"][task]]


def minus(runs: Runs, column: str, other: str, task: str) -> list[float]:
    """Of every example of a task, how much oftener one column is right, in the mean of the seeds."""
    rows = [
        [a - b for a, b in zip(right(run, column, task), right(run, other, task), strict=True)]
        for run in runs
    ]
    return [mean(example) for example in zip(*rows, strict=True)]


def against(runs: Runs, column: str, other: str, tasks: Sequence[str]) -> tuple[str, str]:
    """The difference of two columns with its interval; tasks won, tied and lost."""
    differences = [minus(runs, column, other, task) for task in tasks]
    low, high = hierarchical(differences, resamples=RESAMPLES)
    each = [bootstrap(d, resamples=RESAMPLES) for d in differences]
    won, lost = sum(low > 0 for low, _ in each), sum(high < 0 for _, high in each)
    value = mean(map(mean, differences))
    return f"{value:+.3f} ({low:+.3f}..{high:+.3f})", f"{won}, {len(each) - won - lost}, {lost}"


def cell(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def average(runs: Runs, column: str, tasks: Sequence[str]) -> str:
    return cell([mean(mean(right(run, column, task)) for task in tasks) for run in runs])


def logprob(runs: Runs, column: str) -> str:
    rows = [run["unseen"]["columns"][column]["logprob"].values() for run in runs]
    return f"{mean(map(mean, rows)):.3f}"


def label(column: str) -> str:
    return LABELS.get(column, f"`{column}`")


def columns_of(runs: Runs) -> list[str]:
    """What every seed has: the base, the recipes, then the controls."""
    last = [MERGED, BEST, ORACLE, "multi_task"]
    names = [BASE, *(name for name in runs[0]["proof"]["recipes"]), *last]
    return [n for n in names if all(n in run["unseen"]["columns"] for run in runs)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def main_table(runs: Runs) -> list[str]:
    groups = runs[0]["proof"]["unseen"]
    tasks = [task for group in groups.values() for task in group]
    head = ["", "all", *groups, "minus zero-shot", "won, tied, lost", "minus best individual"]
    rows = []
    for column in columns_of(runs):
        cells = [average(runs, column, part) for part in (tasks, *groups.values())]
        to_base = against(runs, column, BASE, tasks) if column != BASE else ("", "")
        to_best = against(runs, column, BEST, tasks) if column != BEST else ("", "")
        rows.append([label(column), *cells, *to_base, *to_best, logprob(runs, column)])
    return table([*head, "won, tied, lost", "log-prob."], rows)


def task_table(runs: Runs) -> list[str]:
    proof = runs[0]["proof"]
    wanted = [BASE, *proof["shown"], MERGED, BEST, ORACLE, "multi_task"]
    shown = [column for column in wanted if column in columns_of(runs)]
    rows = [
        [f"`{task.partition(':')[2]}`", group, str(len(right(runs[0], BASE, task)))]
        + [f"{mean(mean(right(run, column, task)) for run in runs):.3f}" for column in shown]
        for group, tasks in proof["unseen"].items()
        for task in tasks
    ]
    return table(["task", "", "n", *map(label, shown)], rows)


def own_table(runs: Runs) -> list[str]:
    proof = runs[0]["proof"]
    shown = [BASE, "individual", *proof["shown"]]
    head = [*(LABELS.get(c, f"`{c}`" if c != "individual" else c) for c in shown)]
    head += [f"`{name}`: weight, place" for name in proof["watched"]]
    rows = []
    for task in proof["tasks"]:
        cells = [f"{mean(run['own'][c][task] for run in runs):.3f}" for c in shown]
        cells += [watched(runs, name, [task]) for name in proof["watched"]]
        rows.append([f"`{task.partition(':')[2]}`", *cells])
    cells = [cell([mean(run["own"][c].values()) for run in runs]) for c in shown]
    cells += [watched(runs, name, proof["tasks"]) for name in proof["watched"]]
    rows.append(["**mean**", *cells])
    rows.append(
        ["**first place**", *[""] * len(shown), *(firsts(runs, n) for n in proof["watched"])]
    )
    return table(["task", *head], rows)


def hits(run: dict[str, Any], name: str) -> dict[str, tuple[float, int]]:
    """By trained task: the weight that a router gives to its own expert, and its place by weight."""
    found = {}
    for place, task in enumerate(run["proof"]["tasks"]):
        weights = run["watched"][name][task]
        found[task] = (weights[place], 1 + sum(other > weights[place] for other in weights))
    return found


def watched(runs: Runs, name: str, tasks: Sequence[str]) -> str:
    found = [hits(run, name)[task] for run in runs for task in tasks]
    return f"{mean(weight for weight, _ in found):.3f}, {mean(place for _, place in found):.1f}"


def firsts(runs: Runs, name: str) -> str:
    """Of all tasks and seeds, the share in which a task's own expert has the largest weight."""
    return f"{mean(place == 1 for run in runs for _, place in hits(run, name).values()):.3f}"


def heaviest(run: dict[str, Any], name: str, tasks: Sequence[str]) -> float:
    """Mean accuracy, on unseen tasks, of the expert alone that a router gives the largest weight."""
    singles, total = run["unseen"]["controls"]["singles"], 0.0
    for task in tasks:
        weights = run["watched"][name][task]
        total += singles[run["experts"][weights.index(max(weights))]][task]
    return total / len(tasks)


def any_expert(run: dict[str, Any], tasks: Sequence[str]) -> float:
    """Mean accuracy of all experts, each alone."""
    rows = run["unseen"]["controls"]["singles"].values()
    return mean(mean(row[task] for task in tasks) for row in rows)


def choice_table(runs: Runs) -> list[str]:
    groups = runs[0]["proof"]["unseen"]
    parts = [[task for group in groups.values() for task in group], *groups.values()]
    rows = [
        ["mean of all experts, alone", *(cell([any_expert(r, p) for r in runs]) for p in parts)]
    ]
    for name in runs[0]["proof"]["watched"]:
        cells = [cell([heaviest(run, name, part) for run in runs]) for part in parts]
        rows.append([f"`{name}`: the heaviest expert, alone", *cells])
    rows.append([label(ORACLE), *(average(runs, ORACLE, part) for part in parts)])
    return table(["", "all", *groups], rows)


def section(name: str, runs: Runs) -> list[str]:
    proof: Mapping[str, Any] = runs[0]["proof"]
    experts, limit = len(proof["tasks"]), proof["limit"]
    near = len(proof["unseen"]["near"])
    unseen = sum(map(len, proof["unseen"].values()))
    seeds = ", ".join(str(run["seed"]) for run in runs)
    head = HEAD.format(
        name=name,
        title=proof["base"],
        experts=experts,
        unseen=unseen,
        near=near,
        limit=limit,
        seeds=SPREAD.format(seeds=seeds) if len(runs) > 1 else ONE,
    )
    own = OWN.format(limit=proof["own_limit"], prompts=PROMPTS, experts=experts)
    chosen = CHOSEN.format(prompts=PROMPTS)
    unseen_tables = [*main_table(runs), *task_table(runs), chosen, *choice_table(runs)]
    return [head, *unseen_tables, own, *own_table(runs)]


def lines(folder: Path = HERE) -> list[str]:
    return [line for name, runs in results(folder).items() for line in section(name, runs)]
