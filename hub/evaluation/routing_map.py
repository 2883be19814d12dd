"""Routing maps: the mean weight of every expert in every layer of a routed model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experthub.hub.composition.compose import compose
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.session import Session
from experthub.hub.tracing.prompts import read_prompts
from experthub.hub.tracing.trace import trace


def map_routing(
    recipe: Recipe | Plan | str | Path,
    tasks: Sequence[str],
    *,
    per_task: int = 4,
    session: Session | None = None,
) -> dict[str, Any]:
    """Average the routing weights over the tokens of some prompts, for each layer and expert.

    Args:
        recipe: A path, a Recipe or a Plan with a route.
        tasks: References of the tasks whose prompts are read.
        per_task: The number of prompts of each task; the first ones are read.
        session: The registry, the store and the device. The default is `Session()`.

    Returns:
        A record with `experts` (labels), `layers` (numbers), `tokens` (their number) and
        `weights`. `weights` has one row per layer, with each expert's mean over tokens and routed
        modules. An expert counts as 0 in a module that it does not adapt.

    Raises:
        UsageError: The composition cannot be traced: it is a merge, or the base does not read text
            alone.
    """
    composition = compose(recipe, session=session)
    base = composition.plan.base
    prompts = [(p, task) for task in tasks for p in read_prompts(base, task, per_task)]
    found = trace(composition, [p for p, _ in prompts], tasks=[task for _, task in prompts])
    return {
        "experts": found.experts,
        "layers": [layer.layer for layer in found.layers],
        "weights": [list(layer.weights) for layer in found.layers],
        "tokens": len(found.tokens),
    }
