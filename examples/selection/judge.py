"""Judge how well `hub suggest` ranks experts on real tasks, by the accuracy of each expert alone.

Usage: python examples/selection/judge.py BASE [--limit 64] [--tasks FILE] [--out RESULT.json]
       python examples/selection/judge.py --table RESULT.json ...

All measures see 32 training examples of a task. Each expert alone is scored on the test split. The tables
show gates and prototypes twice: as they are, and relative. A relative score is divided by the geometric
mean of the expert's scores on the other training tasks, as `hub suggest` does by default.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from experthub import hub
from experthub.hub.evaluation.statistics import bootstrap, kendall, spearman
from experthub.hub.files.atomic import write_json
from experthub.hub.files.memory import reuse_memory

HERE = Path(__file__).resolve().parent
MEASURES = ("gates", "prototypes", "embeddings", "tmi")
RELATIVE = {"gates": "gates, relative", "prototypes": "prototypes, relative"}


def main() -> None:
    """Judge the measures, or print the tables of earlier results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--tasks", type=Path, default=HERE / "tasks.txt")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    chosen = parser.parse_args()
    if chosen.table:
        for path in chosen.table:
            print_tables(json.loads(path.read_text()))
        return
    reuse_memory()
    records: list[dict[str, Any]] = []
    for task in chosen.tasks.read_text().split():
        print(task, file=sys.stderr)
        made = hub.suggest(
            task, base=chosen.base, labels=True, relative=False, truth=True, limit=chosen.limit
        )
        records.append(made.record())
        if chosen.out:
            write_json(chosen.out, kept(records, chosen.limit))
    print_tables(kept(records, chosen.limit))


def kept(records: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Reduce the records to what the tables need: scores and truth as lists, in the order of the experts.

    Args:
        records: The records of `hub.suggest`, one per task.
        limit: The number of test examples per task.

    Returns:
        The result, as it is written.
    """
    tasks = []
    for record in records:
        rows = sorted(record["experts"], key=lambda row: row["expert"])
        judged = {
            kind: {name: [row[kind][name] for row in rows] for name in rows[0][kind]}
            for kind in ("scores", "truth")
        }
        named = {name: record[name] for name in ("task", "task_digest", "examples")}
        tasks.append({**named, "n": record["truth_n"], **judged})
    experts = [{name: row[name] for name in ("expert", "digest", "task")} for row in rows]
    base = records[0]["base"]
    return {"schema": 1, "base": base, "limit": limit, "experts": experts, "tasks": tasks}


def print_tables(result: dict[str, Any]) -> None:
    """Print the means over the tasks that some expert was trained on, over the others, and over all.

    Args:
        result: The result, as `kept` returns it.
    """
    trained = {expert["task"] for expert in result["experts"]}
    tasks = with_relative(result["tasks"], trained)
    own = [task for task in tasks if task["task"] in trained]
    others = [task for task in tasks if task["task"] not in trained]
    print(f"\n{result['base']}\n")
    head = "| tasks | measure | n | Spearman, accuracy | Kendall | Spearman, log-prob. "
    print(f"{head}| first - mean | first | best | mean |")
    print(f"| --- | --- |{' ---: |' * 8}")
    for name, some in (("trained on", own), ("others", others), ("all", tasks)):
        for measure in (*MEASURES, *RELATIVE.values()):
            judged = [task for task in some if measure in task["scores"]]
            if judged:
                cells = " | ".join(judgement(measure, judged))
                print(f"| {name} | {measure} | {len(judged)} | {cells} |")
    print("\n| order by | Spearman between two tasks | comes first most often |")
    print("| --- | ---: | --- |")
    for measure in (*MEASURES, *RELATIVE.values()):
        orders = [task["scores"][measure] for task in tasks if measure in task["scores"]]
        print_order(measure, orders, result["experts"])
    print_order("accuracy alone", [task["truth"]["accuracy"] for task in tasks], result["experts"])


def with_relative(
    tasks: Sequence[dict[str, Any]], trained: Collection[str]
) -> list[dict[str, Any]]:
    """Add the relative measures: scores divided by their geometric mean over the training tasks.

    Args:
        tasks: The tasks with their scores.
        trained: The tasks that experts were trained on.

    Returns:
        The tasks with two more measures.
    """
    made = []
    for task in tasks:
        scores = dict(task["scores"])
        for measure, name in RELATIVE.items():
            columns = [
                [math.log(score) for score in other["scores"][measure]]
                for other in tasks
                if other is not task and other["task"] in trained
            ]
            usual = [sum(own) / len(own) for own in zip(*columns, strict=True)]
            if usual:
                pairs = zip(scores[measure], usual, strict=True)
                scores[name] = [math.log(score) - mean for score, mean in pairs]
        made.append({**task, "scores": scores})
    return made


def judgement(measure: str, tasks: Sequence[dict[str, Any]]) -> list[str]:
    """Return the cells of one measure.

    Args:
        measure: The measure.
        tasks: The tasks.

    Returns:
        The correlations, over tasks on which accuracies differ, and the accuracy of the first expert.
    """
    accuracies = [task["truth"]["accuracy"] for task in tasks]
    scores = [task["scores"][measure] for task in tasks]
    ranks = [spearman(s, a) for s, a in zip(scores, accuracies, strict=True)]
    taus = [kendall(s, a) for s, a in zip(scores, accuracies, strict=True)]
    logs = [spearman(task["scores"][measure], task["truth"]["logprob"]) for task in tasks]
    first = [a[s.index(max(s))] for s, a in zip(scores, accuracies, strict=True)]
    means = [sum(a) / len(a) for a in accuracies]
    gains = [f - m for f, m in zip(first, means, strict=True)]
    tau = [value for value in taus if value is not None]
    plain = [first, [max(a) for a in accuracies], means]
    return [
        ranged(ranks),
        f"{sum(tau) / len(tau):+.2f}",
        ranged(logs),
        ranged(gains, 3),
        *(f"{sum(values) / len(values):.3f}" for values in plain),
    ]


def ranged(found: Sequence[float | None], digits: int = 2) -> str:
    """Format a mean over tasks with its 95 % bootstrap interval.

    Args:
        found: A value per task; None is skipped.
        digits: The number of decimals.

    Returns:
        The text.
    """
    values = [value for value in found if value is not None]
    low, high = bootstrap(values)
    mean = sum(values) / len(values)
    return f"{mean:+.{digits}f} ({low:+.{digits}f}..{high:+.{digits}f})"


def print_order(
    name: str, orders: Sequence[Sequence[float]], experts: Sequence[dict[str, Any]]
) -> None:
    """Print how similar the orders of the experts are between tasks.

    Args:
        name: The name of the measure.
        orders: The experts' scores on each task.
        experts: The experts.
    """
    pairs = [spearman(a, b) for a, b in combinations(orders, 2)]
    alike = [value for value in pairs if value is not None]
    if alike:
        first = Counter(experts[order.index(max(order))]["expert"] for order in orders)
        label, count = first.most_common(1)[0]
        mean = f"{sum(alike) / len(alike):+.2f}"
        print(f"| {name} | {mean} | {label.split('@')[0]}, {count} of {len(orders)} |")


if __name__ == "__main__":
    main()
