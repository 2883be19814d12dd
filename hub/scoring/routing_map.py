"""Where a routed model sends its tokens: the mean weight of every expert in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases import load_tokenizer
from experthub.hub.composition import Composition, compose
from experthub.hub.errors import UsageError
from experthub.hub.plan import Plan, layer_of
from experthub.hub.recipe import Recipe
from experthub.hub.registry import Registry
from experthub.hub.tasks.task import read_task
from experthub.routing import RoutedLinear


@torch.no_grad()
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
    expert does not adapt a module.
    """
    composition = compose(recipe, registry=registry)
    if not composition.plan.routed:
        raise UsageError("a merge routes nothing", "name a recipe with route:")
    tokenizer = load_tokenizer(composition.plan.base)
    read = [read_task(reference) for reference in tasks]
    if composition.plan.base.causal:
        prompts = [task.prompt(e) for task in read for e in task.split("all", per_task)]
    else:
        prompts = [e.input for task in read for e in task.split("all", per_task)]
    totals, tokens = _totals(composition, tokenizer, prompts)
    layers = sorted({layer_of(name) for name in totals})
    rows = []
    for layer in layers:
        here = [total for name, total in totals.items() if layer_of(name) == layer]
        rows.append((torch.stack(here).mean(0) / tokens).tolist())
    labels = [expert.label for expert in composition.plan.experts]
    return {"experts": labels, "layers": layers, "weights": rows, "tokens": tokens}


def _totals(
    composition: Composition, tokenizer: Any, prompts: Sequence[str]
) -> tuple[dict[str, torch.Tensor], int]:
    """Every routed module's weights, summed over the tokens, `[E]` by name; and the tokens."""
    n_experts, model = len(composition.plan.experts), composition.model
    totals: dict[str, torch.Tensor] = {}
    handles = []

    def watch(name: str, module: RoutedLinear) -> Any:
        def before(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            weights = module.routing(inputs[0]).reshape(-1, len(module.experts)).sum(0)
            totals[name][list(module.experts)] += weights.double().cpu()

        return module.register_forward_pre_hook(before)

    for name, module in model.named_modules():
        if isinstance(module, RoutedLinear):
            totals[name] = torch.zeros(n_experts, dtype=torch.double)
            handles.append(watch(name, module))
    count = 0
    try:
        for prompt in prompts:
            batch = tokenizer(prompt, return_tensors="pt").to(model.device)
            model(**batch)
            count += batch["input_ids"].shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return totals, count
