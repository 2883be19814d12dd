"""How well hub suggest ranks experts on real tasks: every measure against what experts do alone.

Usage: python examples/selection/judge.py BASE [--limit 64] [--tasks FILE] [--out RESULT.json]
       python examples/selection/judge.py --table RESULT.json ...

All measures see 32 training examples of a task; each expert alone is scored on its test split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experthub import hub
from experthub.hub._files import write_json
from experthub.hub._memory import reuse_memory
from experthub.hub.scoring.statistics import bootstrap

HERE = Path(__file__).resolve().parent
MEASURES = ("gates", "prototypes", "embeddings", "tmi")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--tasks", type=Path, default=HERE / "tasks.txt")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    chosen = parser.parse_args()
    if chosen.table:
        for path in chosen.table:
            print_table(path.stem, json.loads(path.read_text())["tasks"])
        return
    reuse_memory()
    records = []
    for task in chosen.tasks.read_text().split():
        print(task, file=sys.stderr)
        made = hub.suggest(task, base=chosen.base, labels=True, truth=True, limit=chosen.limit)
        records.append(made.record())
        if chosen.out:
            write_json(chosen.out, {"schema": 1, "tasks": records})
    print_table(chosen.base, records)


def print_table(base: str, records: Sequence[dict[str, Any]]) -> None:
    """Means over tasks, for those that some expert was trained on and for the others."""
    own = [r for r in records if r["task"] in {e["task"] for e in r["experts"]}]
    others = [r for r in records if r not in own]
    print(f"\n{base}\n")
    print(
        "| tasks | measure | n | Spearman, accuracy | Kendall | Spearman, log-prob. | first | best | mean |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, some in (("trained on", own), ("others", others), ("all", records)):
        for measure in MEASURES:
            judged = [r["correlations"][measure] for r in some if measure in r["correlations"]]
            if judged:
                print(f"| {name} | `{measure}` | {len(judged)} | {' | '.join(cells(judged))} |")


def cells(judged: Sequence[dict[str, Any]]) -> list[str]:
    def mean(kind: str, name: str) -> tuple[float, list[float]]:
        values = [one[kind][name] for one in judged if one[kind][name] is not None]
        return sum(values) / len(values), values

    def ranked(kind: str, name: str) -> str:
        value, values = mean(kind, name)
        low, high = bootstrap(values)
        return f"{value:+.2f} ({low:+.2f}..{high:+.2f})"

    kinds = [("accuracy", "spearman"), ("accuracy", "kendall"), ("logprob", "spearman")]
    plain = [f"{mean('accuracy', name)[0]:.3f}" for name in ("first", "best", "mean")]
    return [*(ranked(*kind) for kind in kinds), *plain]


if __name__ == "__main__":
    main()
