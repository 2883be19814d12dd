"""Controls: the scores of every expert alone, and of the best choices among the experts.

`best_individual` is the one expert with the best average over the tasks, and `oracle` is the best
expert of each task. Both are selected by the same scores that they report, so they are optimistic.
A router that reaches `best_individual` is as good as a user who picks one expert with the help of
labels. No choice of one expert per task exceeds `oracle`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experthub.hub.errors import UsageError
from experthub.hub.evaluation.result import Outcome, mean
from experthub.hub.kinds import kinds
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.registry.content import Content
from experthub.hub.session import Session
from experthub.hub.tasks.task import Chosen

BEST_INDIVIDUAL, ORACLE, MERGED = "best_individual", "oracle", "merged"


def plan_controls(plans: Mapping[str, Plan], session: Session) -> tuple[Plan, dict[str, Plan]]:
    """Plan the controls: the mean of all experts, and each expert alone.

    Args:
        plans: The evaluated plans, by name; they hold the experts.
        session: The registry, the store and the progress callback.

    Returns:
        The plan of the mean, and the plan of each expert by its reference.

    Raises:
        UsageError: A plan has the name of a control, or an expert cannot be merged.
    """
    contents: dict[str, Content] = {}
    for member in (m for p in plans.values() for m in p.members):
        if kinds[member.kind].load is None:
            raise UsageError(
                f"--controls merges the experts, and {member.reference} is "
                f"{kinds[member.kind].label}",
                "remove --controls",
            )
        contents.setdefault(member.digest, member.content)
    experts = list(contents.values())
    plan = next(iter(plans.values()))
    common = {
        "base": plan.recipe.base,
        "dtype": plan.dtype,
        "allow_base_mismatch": any(p.recipe.allow_base_mismatch for p in plans.values()),
        "merge": {"method": "linear"},
    }
    taken = {BEST_INDIVIDUAL, ORACLE, MERGED} & set(plans)
    if taken:
        raise UsageError(f"{taken.pop()} is the name of a control", "rename the recipe's file")

    def plan_mean(members: list[Content]) -> Plan:
        recipe = Recipe.of({**common, "experts": [m.reference for m in members]})
        return resolve(recipe, pinned=members, session=session)

    return plan_mean(experts), {m.reference: plan_mean([m]) for m in experts}


def pick_best_experts(
    singles: Mapping[str, Sequence[Outcome]], chosen: Sequence[Chosen]
) -> tuple[dict[str, list[Outcome]], dict[str, Any]]:
    """Pick the best expert on average and the best expert of each task, by accuracy.

    If several experts have the same accuracy, the first one is picked.

    Args:
        singles: The outcomes of each expert alone, one per task, by the expert's reference.
        chosen: The tasks, in the order of the outcomes.

    Returns:
        The outcomes of the columns `best_individual` and `oracle`, one per task; and a record with
        the experts that were picked and the accuracy of every expert on every task.
    """
    accuracies = {name: [mean(o.right) for o in found] for name, found in singles.items()}
    best = max(accuracies, key=lambda name: mean(accuracies[name]))
    by_task = [max(accuracies, key=lambda name: accuracies[name][i]) for i in range(len(chosen))]
    columns = {
        BEST_INDIVIDUAL: list(singles[best]),
        ORACLE: [singles[name][i] for i, name in enumerate(by_task)],
    }
    tasks = [one.task.reference for one in chosen]
    return columns, {
        BEST_INDIVIDUAL: best,
        ORACLE: dict(zip(tasks, by_task, strict=True)),
        "singles": {name: dict(zip(tasks, row, strict=True)) for name, row in accuracies.items()},
    }
