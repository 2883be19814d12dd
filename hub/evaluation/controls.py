"""Controls: what every expert does alone, and what the best choice among them would have done.

Both choices look at the very scores that they are reported with, so they flatter: a router that
reaches `best_individual` has found the expert that a user with labels would have picked, and `oracle`
is the most that one expert per task can give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experthub.hub.errors import UsageError
from experthub.hub.evaluation.result import Outcome, mean
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.registry.content import Content
from experthub.hub.session import Session
from experthub.hub.tasks.task import Chosen

BEST, ORACLE, AVERAGE = "best_individual", "oracle", "merged"


def control_plans(plans: Mapping[str, Plan], session: Session) -> tuple[Plan, dict[str, Plan]]:
    """Plan the controls: the mean of all experts, and each expert alone.

    Args:
        plans: The evaluated plans, by name; they hold the experts.
        session: The registry, the store and the progress callback.

    Returns:
        The plan of the mean, and the plan of each expert by its reference.

    Raises:
        UsageError: A plan has the name of a control.
    """
    contents: dict[str, Content] = {}
    for member in (m for p in plans.values() for m in p.members):
        contents.setdefault(member.digest, member.content)
    experts = list(contents.values())
    plan = next(iter(plans.values()))
    common = {
        "base": plan.recipe.base,
        "dtype": plan.dtype,
        "allow_base_mismatch": any(p.recipe.allow_base_mismatch for p in plans.values()),
        "merge": {"method": "linear"},
    }
    taken = {BEST, ORACLE, AVERAGE} & set(plans)
    if taken:
        raise UsageError(f"{taken.pop()} is the name of a control", "rename the recipe's file")

    def mean_of(members: list[Content]) -> Plan:
        recipe = Recipe.of({**common, "experts": [m.reference for m in members]})
        return resolve(recipe, pinned=members, session=session)

    return mean_of(experts), {m.reference: mean_of([m]) for m in experts}


def pick(
    singles: Mapping[str, Sequence[Outcome]], chosen: Sequence[Chosen]
) -> tuple[dict[str, list[Outcome]], dict[str, Any]]:
    """The columns `best_individual` and `oracle`, and which experts they are; ties go to the first."""
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
