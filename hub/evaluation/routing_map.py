"""Where a routed model sends its tokens: the mean weight of every expert in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experthub.hub.composition.composition import compose
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.registry.registry import Registry
from experthub.hub.tracing.trace import task_prompts, trace


def routing_map(
    recipe: Recipe | Plan | str | Path,
    tasks: Sequence[str],
    *,
    per_task: int = 4,
    registry: Registry | None = None,
) -> dict[str, Any]:
    """Mean routing weights over the tokens of some prompts, by layer and expert.

    per_task: prompts of each task, the first ones.  Returns `experts` (labels), `layers` (numbers),
    and `weights`, a row per layer, each expert's mean over tokens and routed modules; 0 where an
    expert does not adapt a module.  Raises UsageError for what cannot be traced: a merge, a base
    that does not read text.
    """
    composition = compose(recipe, registry=registry)
    base = composition.plan.base
    prompts = [(p, task) for task in tasks for p in task_prompts(base, task, per_task)]
    found = trace(composition, [p for p, _ in prompts], tasks=[task for _, task in prompts])
    return {
        "experts": found.experts,
        "layers": [layer.layer for layer in found.layers],
        "weights": [list(layer.weights) for layer in found.layers],
        "tokens": len(found.tokens),
    }
