"""Composing: a plan becomes a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from experthub.hub.bases.base import load_model
from experthub.hub.bases.tying import tie_again, untie
from experthub.hub.composition.bank import bank_for
from experthub.hub.composition.routes import Routes, route, router_state
from experthub.hub.composition.weights import Contents, task_vector
from experthub.hub.errors import HubError, IntegrityError, UsageError, explained
from experthub.hub.materials.learned import merge
from experthub.hub.materials.router_state import State
from experthub.hub.progress import Report, silent
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from experthub.hub.transfer.pull import pull
from experthub.merge import TaskVector, uses
from torch import nn


@dataclass
class Composition:
    """A composed model and the plan it was made from.

    model: a transformers model, frozen, in eval mode.  merged: for a merge, the task vector that
    was added to the base.
    """

    model: Any
    plan: Plan
    merged: TaskVector | None = None
    _routes: tuple[Routes, ...] = ()

    @property
    def lock(self) -> dict[str, Any]:
        """Everything the model is made of, pinned by digest."""
        return self.plan.lock

    def detach(self) -> Any:
        """Put a routed model's original modules back, bit for bit, and return the model.

        Raises UsageError for a merge: its base was changed, and is loaded again instead.
        """
        if any(unit.recipe.route is None for unit in self.plan.units):
            raise UsageError("the weights of a merge have changed", "load the base instead")
        for routes in self._routes:
            routes.undo(self.model)
        return self.model

    @contextmanager
    def tasks(self, names: Sequence[str] | str) -> Iterator[None]:
        """Say which task each row of the batches inside is of, for a router by task.

        names: one for each row, or one for all: experts as the recipe calls them, or the tasks that
        they were trained on.
        """
        watches = [routes.watch for routes in self._routes]
        before = [watch.tasks for watch in watches]
        for watch in watches:
            watch.tasks = (names,) if isinstance(names, str) else tuple(names)
        try:
            yield
        finally:
            for watch, tasks in zip(watches, before, strict=True):
                watch.tasks = tasks

    def save(self, folder: Path | str, format: Literal["hf", "peft"] = "hf") -> Path:
        """Write a merged model as a folder that transformers loads, or as one PEFT adapter.

        format: `hf`, the whole model with its tokenizer; `peft`, the exact merged LoRA, its rank
        the sum of the experts' ranks.  Raises UsageError for a routed model, which is no set of
        weights.
        """
        from experthub.hub.composition.export import save

        return save(self, Path(folder), format)


def compose(
    recipe: Recipe | Plan | str | Path | dict[str, Any],
    *,
    device: str | None = None,
    model: Any = None,
    registry: Registry | None = None,
    store: Store | None = None,
    report: Report = silent,
    router: State | None = None,
) -> Composition:
    """Compose a base with experts, by a merge or a router.

    recipe: a path, a mapping, a Recipe, or a Plan.  device: where the model is put, `cpu` by
    default.  model: an already loaded base, whose weights are shared where they do not change and
    are themselves never changed.  router: the state of the router, in place of what is stored or
    would be made.  Raises HubError for anything that is wrong with the recipe.
    """
    store = store or Store()
    if isinstance(recipe, str | Path):
        recipe = Recipe.read(recipe)
    elif isinstance(recipe, dict):
        recipe = Recipe.of(recipe)
    if isinstance(recipe, Plan):
        plan = recipe
    else:
        plan = resolve(recipe, registry, store, report, packed=True)
    banks = [bank_for(unit) for unit in plan.units]
    packed = all(bank is not None and bank.there for bank in banks)
    if not packed and any(banks):
        pull(store, *(member.content for member in plan.members), report=report)
    if router is None and plan.parts == () and plan.recipe.route is not None:
        router = router_state(plan, registry, store, device, report)
    report("loading the base", 0, 0)
    with Contents([] if packed else plan.members, store, gates=_gated(plan)) as contents:
        if model is None:
            target = load_model(plan.base, plan.dtype, device)
        else:
            target = _checked_shell(model, plan.dtype, device)
        if not packed:  # when it was packed, it was checked
            _check_orientation(target, plan)
        report(f"composing {len(plan.experts)} experts", 0, 0)
        merged: list[TaskVector] = []
        routes = []
        # Weights are changed first, so that routed modules have them too.
        units = sorted(zip(plan.units, banks, strict=True), key=lambda one: one[0].routed)
        for unit, bank in units:
            with torch.no_grad(), explained(unit.recipe.method.method):
                if unit.recipe.merge:
                    vectors = [task_vector(expert, unit, contents) for expert in unit.experts]
                    merged.append(merge(unit, vectors, device, store, report))
                    _add(target, merged[-1], unit)
                else:
                    state = router or State({})
                    routes.append(
                        route(target, unit, contents, store, state, bank, registry, report)
                    )
        merged += [one.folded for one in routes if one.folded is not None]
        return Composition(target, plan, None if plan.routed else _union(merged), tuple(routes))


def _union(vectors: Sequence[TaskVector]) -> TaskVector:
    """The changes of all parts, which have no weight in common."""
    if len(vectors) == 1:
        return vectors[0]
    load = {name: load for vector in vectors for name, load in vector.load.items()}
    return TaskVector(vectors[0].base, load)


def _gated(plan: Plan) -> bool:
    return any("gates" in method.strategy.needs for method in plan.recipe.methods)


def _checked_shell(model: Any, dtype: str, device: str | None) -> Any:
    wrong = str(model.dtype) != f"torch.{dtype}"
    if wrong or (device and model.device != torch.device(device)):
        raise UsageError(
            f"the model given is {model.dtype} on {model.device}",
            "load it with the dtype and on the device that are asked for",
        )
    return _shell(model).eval()


def _shell(module: Any, made: dict[int, Any] | None = None) -> Any:
    """A copy of the module tree that shares every parameter and buffer with it."""
    made = {} if made is None else made
    if id(module) not in made:
        clone = made[id(module)] = copy.copy(module)
        # The module's own dicts (parameters, buffers, children, hooks) are its own to change.
        own = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}
        own["_modules"] = {
            name: None if child is None else _shell(child, made)
            for name, child in module._modules.items()
        }
        vars(clone).update(own)
    return made[id(module)]


def _check_orientation(model: Any, plan: Plan) -> None:
    """Refuse a fan_in_fan_out that does not fit the module: a square weight shows no other sign."""
    modules, changed = dict(model.named_modules()), set(plan.parameters)
    for member in plan.members:
        for adapted in member.adapted:
            if f"{adapted.module}.weight" not in changed or adapted.embedding:
                continue
            module = modules[adapted.module]
            if (type(module).__name__ == "Conv1D") != adapted.transposed:
                raise HubError(
                    f"{member.reference}: fan_in_fan_out is {adapted.transposed}, "
                    f"and {adapted.module} is a {type(module).__name__}",
                    "correct it in adapter_config.json: true for Conv1D, false for Linear",
                )


def _add(model: Any, merged: TaskVector, plan: Plan) -> None:
    """Change a model's weights by a task vector."""
    tied = untie(model, merged, plan)
    places = uses(model, merged)
    for name in merged:
        # A new tensor, not a sum in place: the base's file stays mapped, and nobody else's changes.
        changed = merged[name].add_to(model.get_parameter(name))
        parameter = nn.Parameter(changed, requires_grad=False)
        for module, leaf in places[name]:
            module.register_parameter(leaf, parameter)
        # What is not finite makes the sum so; a finite weight may too, so then each is looked at.
        if not math.isfinite(changed.sum()) and not bool(torch.isfinite(changed).all()):
            raise IntegrityError(f"{name} overflows {plan.dtype}", "use smaller weights or float32")
    if tied is not None:
        tie_again(model, tied)
