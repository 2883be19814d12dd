"""Write the section on routers of docs/results.md from the results of their runs.

`examples/suite/table.py` appends it to the sections on the suites.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experthub.hub.evaluation.statistics import bootstrap, bootstrap_groups

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

This section scores {experts} experts with gates on {unseen} tasks that none of them was trained on.
Of these, {near} tasks are near the trained ones: they share the dataset, or ask the same question about other inputs.
The other tasks are far.

- The values are accuracies on at most {limit} examples of each task, taken from all splits. The averages weight all tasks alike.
- {seeds}
- The intervals are 95 % intervals of the paired bootstrap over tasks and examples, for the mean over seeds.
- A task is won or lost if its own interval excludes zero. Otherwise it is tied.
- The best individual expert is one expert for all tasks, the oracle one expert for each task.
- Both are chosen by the scores that are shown, so their accuracies are too optimistic.
- The last column is the mean log-probability of the right choice.
- Row names in code font are names of recipes. The recipes and tasks are in `examples/routers/{name}.yaml`.
- A number in such a name is the `scale` of `task_arithmetic` or the `temperature` of `phatgoose`.
- `_top_1` and `_top_3` set `top_k`; `_all` sets it to the number of experts. `_parameters` sets `combine: parameters`.{closed}
- `make routers-{name}` computes the results.
"""
CLOSED = """
- `_closed`: all gates were trained from a weight of 0.1 (`hub train gate --start 0.1`).
- `_advised`: only the gates for which `hub train gate` recommends it were trained from 0.1."""
SPREAD = (
    "Each value is the mean over seeds {seeds}. "
    "The number after ± is the standard deviation between seeds."
)
ONE = "The values come from one seed, because these experts exist for one seed only."
CHOSEN = """### Which experts routers choose on unseen tasks

For each unseen task, the heaviest expert is the one with the largest mean weight under a router on {prompts} inputs.
The table shows the accuracy of that expert alone.
"""
OWN = """### On the experts' own tasks

The first columns show the accuracy on at most {limit} examples of each test split.
The columns `weight, place` show how a router weights the task's own expert on {prompts} of these inputs:

- Weight is the mean weight of that expert over tokens and modules.
- Place is its rank among the {experts} experts by this weight.
- The last row is the share of tasks and seeds in which the task's own expert has the largest weight.
"""
PROMPTS = 16
Runs = Sequence[dict[str, Any]]


def results(folder: Path = HERE) -> dict[str, list[dict[str, Any]]]:
    """Read the runs of all seeds, by the name of the proof."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-[0-9].json")):
        run = json.loads(path.read_text())
        found.setdefault(run["proof"]["name"], []).append(run)
    return found


def right(run: dict[str, Any], column: str, task: str) -> list[int]:
    """Return 1 or 0 for each example of a task: whether a column was right."""
    return [int(one) for one in run["unseen"]["columns"][column]["right"][task]]


def minus(runs: Runs, column: str, other: str, task: str) -> list[float]:
    """Return how much more often one column is right than another, per example, averaged over seeds."""
    rows = [
        [a - b for a, b in zip(right(run, column, task), right(run, other, task), strict=True)]
        for run in runs
    ]
    return [mean(example) for example in zip(*rows, strict=True)]


def against(runs: Runs, column: str, other: str, tasks: Sequence[str]) -> tuple[str, str]:
    """Format the difference of two columns with its interval, and the tasks won, tied and lost."""
    differences = [minus(runs, column, other, task) for task in tasks]
    low, high = bootstrap_groups(differences, resamples=RESAMPLES)
    each = [bootstrap(d, resamples=RESAMPLES) for d in differences]
    won, lost = sum(low > 0 for low, _ in each), sum(high < 0 for _, high in each)
    value = mean(map(mean, differences))
    return f"{value:+.3f} ({low:+.3f}..{high:+.3f})", f"{won}, {len(each) - won - lost}, {lost}"


def cell(values: Sequence[float]) -> str:
    """Format a mean, with the standard deviation if there are several values."""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def average(runs: Runs, column: str, tasks: Sequence[str]) -> str:
    """Format the accuracy of a column, averaged over tasks."""
    return cell([mean(mean(right(run, column, task)) for task in tasks) for run in runs])


def logprob(runs: Runs, column: str) -> str:
    """Format the mean log-probability of the right choice."""
    rows = [run["unseen"]["columns"][column]["logprob"].values() for run in runs]
    return f"{mean(map(mean, rows)):.3f}"


def label(column: str) -> str:
    """Return the name of a column as the page shows it."""
    return LABELS.get(column, f"`{column}`")


def columns_of(runs: Runs) -> list[str]:
    """List the columns that every seed has: the base, the recipes, then the controls."""
    last = [MERGED, BEST, ORACLE, "multi_task"]
    names = [BASE, *(name for name in runs[0]["proof"]["recipes"]), *last]
    return [n for n in names if all(n in run["unseen"]["columns"] for run in runs)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def main_table(runs: Runs) -> list[str]:
    """Return the table of all columns: averages, differences and log-probabilities."""
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
    """Return the table of accuracies on each unseen task."""
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
    """Return the table of accuracies and weights on the tasks of the experts."""
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
    """Return the weight of each trained task's own expert under a router, and its place by weight."""
    found = {}
    for place, task in enumerate(run["proof"]["tasks"]):
        weights = run["watched"][name][task]
        found[task] = (weights[place], 1 + sum(other > weights[place] for other in weights))
    return found


def watched(runs: Runs, name: str, tasks: Sequence[str]) -> str:
    """Format the mean weight and the mean place of the tasks' own experts."""
    found = [hits(run, name)[task] for run in runs for task in tasks]
    return f"{mean(weight for weight, _ in found):.3f}, {mean(place for _, place in found):.1f}"


def firsts(runs: Runs, name: str) -> str:
    """Format the share of tasks and seeds in which the task's own expert has the largest weight."""
    return f"{mean(place == 1 for run in runs for _, place in hits(run, name).values()):.3f}"


def heaviest(run: dict[str, Any], name: str, tasks: Sequence[str]) -> float:
    """Return the mean accuracy of the expert to which a router gives the largest weight, used alone."""
    singles, total = run["unseen"]["controls"]["singles"], 0.0
    for task in tasks:
        weights = run["watched"][name][task]
        total += singles[run["experts"][weights.index(max(weights))]][task]
    return total / len(tasks)


def any_expert(run: dict[str, Any], tasks: Sequence[str]) -> float:
    """Return the mean accuracy of all experts, each used alone."""
    rows = run["unseen"]["controls"]["singles"].values()
    return mean(mean(row[task] for task in tasks) for row in rows)


def choice_table(runs: Runs) -> list[str]:
    """Return the table of accuracies of the experts that routers choose."""
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
    """Return the lines of the section of one proof."""
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
        closed=CLOSED if "closed_gate" in proof else "",
    )
    own = OWN.format(limit=proof["own_limit"], prompts=PROMPTS, experts=experts)
    chosen = CHOSEN.format(prompts=PROMPTS)
    unseen_tables = [*main_table(runs), *task_table(runs), chosen, *choice_table(runs)]
    return [head, *unseen_tables, own, *own_table(runs)]


def lines(folder: Path = HERE) -> list[str]:
    """Return the lines of the sections of all proofs."""
    return [line for name, runs in results(folder).items() for line in section(name, runs)]
