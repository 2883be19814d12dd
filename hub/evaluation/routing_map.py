"""Where a routed model sends its tokens: the mean weight of every expert in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experthub.hub.composition.compose import compose
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.session import Session
from experthub.hub.tracing.trace import task_prompts, trace


def routing_map(
    recipe: Recipe | Plan | str | Path,
    tasks: Sequence[str],
    *,
    per_task: int = 4,
    session: Session | None = None,
) -> dict[str, Any]:
    """Average the routing weights over the tokens of some prompts, by layer and expert.

    Args:
        recipe: A path, a Recipe or a Plan with a route.
        tasks: References of the tasks whose prompts are read.
        per_task: The number of prompts of each task; the first ones are read.
        session: The registry, the store and the device. The default is `Session()`.

    Returns:
        `experts` (labels), `layers` (numbers), `tokens` (their number) and `weights`: one row per
        layer, with each expert's mean over tokens and routed modules. The weight is 0 where an
        expert does not adapt a module.

    Raises:
        UsageError: The composition cannot be traced: it is a merge, or the base does not read text.
    """
    composition = compose(recipe, session=session)
    base = composition.plan.base
    prompts = [(p, task) for task in tasks for p in task_prompts(base, task, per_task)]
    found = trace(composition, [p for p, _ in prompts], tasks=[task for _, task in prompts])
    return {
        "experts": found.experts,
        "layers": [layer.layer for layer in found.layers],
        "weights": [list(layer.weights) for layer in found.layers],
        "tokens": len(found.tokens),
    }
