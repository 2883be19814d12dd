"""Controls: what every expert does alone, and what the best choice among them would have done.

Both choices look at the very scores that they are reported with, so they flatter: a router that
reaches `best_single` has found the expert that a user with labels would have picked, and `oracle`
is the most that one expert per task can give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experthub.hub.errors import UsageError
from experthub.hub.plan import Plan
from experthub.hub.recipe import Recipe
from experthub.hub.scoring.result import Chosen, Outcome, mean

BEST, ORACLE, AVERAGE = "best_single", "oracle", "merged_average"


def control_recipes(plans: Mapping[str, Plan]) -> tuple[Recipe, dict[str, Recipe]]:
    """The mean of all experts that the recipes name, and each of them alone, by label."""
    experts: dict[str, str] = {}
    plan = next(iter(plans.values()))
    for member in (m for p in plans.values() for m in p.members):
        experts.setdefault(member.digest, member.reference)
    common = {
        "base": plan.recipe.base,
        "dtype": plan.dtype,
        "allow_base_mismatch": any(p.recipe.allow_base_mismatch for p in plans.values()),
        "merge": {"method": "linear"},
    }
    taken = {BEST, ORACLE, AVERAGE} & set(plans)
    if taken:
        raise UsageError(f"{taken.pop()} is the name of a control", "rename the recipe's file")
    together = Recipe.of({**common, "experts": list(experts.values())})
    return together, {r: Recipe.of({**common, "experts": [r]}) for r in experts.values()}


def pick(
    singles: Mapping[str, Sequence[Outcome]], chosen: Sequence[Chosen]
) -> tuple[dict[str, list[Outcome]], dict[str, Any]]:
    """The columns `best_single` and `oracle`, and which experts they are; ties go to the first."""
    accuracies = {name: [mean(o.right) for o in found] for name, found in singles.items()}
    best = max(accuracies, key=lambda name: mean(accuracies[name]))
    by_task = [max(accuracies, key=lambda name: accuracies[name][i]) for i in range(len(chosen))]
    columns = {
        BEST: list(singles[best]),
        ORACLE: [singles[name][i] for i, name in enumerate(by_task)],
    }
    tasks = [one.task.reference for one in chosen]
    return columns, {
        BEST: best,
        ORACLE: dict(zip(tasks, by_task, strict=True)),
        "singles": {name: dict(zip(tasks, row, strict=True)) for name, row in accuracies.items()},
    }
