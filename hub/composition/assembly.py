"""Assembling a model from a plan and the state of its method."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from experthub.hub.bases.loading import AUTO, load_model
from experthub.hub.bases.tying import tie_again, untie
from experthub.hub.composition.bank import find_bank
from experthub.hub.composition.composition import Composition
from experthub.hub.composition.forward_hooks import Watch
from experthub.hub.composition.model_state import ModelState
from experthub.hub.composition.routes import route
from experthub.hub.composition.saving import refuse_saving
from experthub.hub.composition.soft_prompts import attach_prompts
from experthub.hub.composition.weights import (
    Contents,
    load_dense_vector,
    load_lacking,
    load_task_vector,
)
from experthub.hub.errors import HubError, IntegrityError, UsageError, explain_errors
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session
from experthub.hub.transfer.pull import pull
from experthub.merge import Delta, TaskVector, combine, find_uses
from torch import Tensor, nn


def assemble(
    plan: Plan,
    session: Session,
    state: Any = None,
    *,
    model: Any = None,
    device: str | None = None,
) -> Composition:
    """Compose the model of a plan.

    Args:
        plan: The plan.
        session: The store, the registry, the device and the progress callback.
        state: The state of the plan's method; None for a method without state.
        model: A base that is loaded already; see `compose`.
        device: The device on which the loaded base must be; None means any.

    Returns:
        The composed model and its plan.

    Raises:
        UsageError: The loaded base has another dtype or is on another device, or a merge is wanted
            on the device `auto`.
        IntegrityError: The content of an expert is damaged, or a merged weight overflows.
        HubError: The experts do not fit the model.
    """
    changes = not plan.virtual_tokens
    if session.device == AUTO and any(
        changes and (unit.recipe.merge or unit.folds) for unit in plan.units
    ):
        raise UsageError(
            "a merge changes weights that --device auto may leave on the disk",
            "write the model with hub compose --out, which needs little memory, or use a route",
        )
    if plan.virtual_tokens:
        return _assemble_prompts(plan, session, state, model, device)
    banks = [find_bank(unit) for unit in plan.units]
    whole = plan.completes_base or any(unit.dense for unit in plan.units)
    packed = not whole and all(bank is not None and bank.is_complete for bank in banks)
    if not packed and any(banks):
        pull(session, *(member.content for member in plan.members))
    session.report("loading the base", 0, 0)
    gated = any("gates" in method.strategy.needs for method in plan.recipe.methods)
    with Contents([] if packed else plan.members, session.store, gates=gated) as contents:
        if model is None:
            target = load_model(plan.base, plan.dtype, session.device)
        else:
            target = _copy_model(model, plan.dtype, device)
        before = ModelState(target) if whole and plan.routed else None
        complete_base(target, plan, contents)
        session.report(
            f"composing {len(plan.experts)} expert" + "s" * (len(plan.experts) != 1), 0, 0
        )
        merged: list[TaskVector] = []
        routes, watch = [], Watch()
        # Merges come first, so that routed modules get the changed weights.
        units = sorted(zip(plan.units, banks, strict=True), key=lambda one: one[0].routed)
        for unit, bank in units:
            with torch.no_grad(), explain_errors(unit.recipe.method.method):
                if unit.dense:
                    merged.append(load_dense_vector(unit, contents))
                    _add(target, merged[-1], unit)
                if unit.recipe.merge:
                    merged.append(merge_experts(unit, contents, state))
                    _add(target, merged[-1], unit)
                else:
                    routes.append(route(target, unit, contents, state, bank, session, watch))
        merged += [one.folded for one in routes if one.folded is not None]
        change = None if plan.routed else _unite(merged)
        if change is None:
            refuse_saving(target)
        return Composition(target, plan, change, state, tuple(routes), watch, before)


def _assemble_prompts(
    plan: Plan, session: Session, state: Any, model: Any, device: str | None
) -> Composition:
    """Compose a model with soft prompts, which shares every weight with its base."""
    session.report("loading the base", 0, 0)
    if model is None:
        target = load_model(plan.base, plan.dtype, session.device)
    else:
        target = _copy_model(model, plan.dtype, device)
    watch = Watch()
    attached = attach_prompts(target, plan, state, session, watch)
    refuse_saving(target)
    return Composition(target, plan, None, state, (attached,), watch)


def complete_base(model: Any, plan: Plan, contents: Contents) -> None:
    """Give a model the weights and the tokens that its base lacks and that the experts bring along.

    Args:
        model: The base's model, which is changed in place.
        plan: The plan.
        contents: The experts' files.
    """
    if (embeddings := contents.open_embeddings(plan)) is not None:
        embeddings.complete(model)
    for name, value in load_lacking(plan, contents).items():
        owner, _, leaf = name.rpartition(".")
        own = value.to(model.get_parameter(name))
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(own, requires_grad=False))


def merge_experts(plan: Plan, contents: Contents, state: Any) -> TaskVector:
    """Merge the experts of a plan into one task vector, lazily.

    Args:
        plan: A plan with one merge.
        contents: The experts' files.
        state: The state of the method; None for a method without state.

    Returns:
        The task vector.

    Raises:
        ValueError: The method returned something else.
    """
    method = plan.recipe.method
    vectors = [load_task_vector(expert, plan, contents) for expert in plan.experts]
    weights = torch.tensor([expert.weight for expert in plan.experts])
    prepared = () if state is None else (state,)
    merged = method.strategy.call(vectors, weights, *prepared, **method.options)
    if not isinstance(merged, TaskVector):
        raise ValueError(f"returned {type(merged).__name__}, expected a TaskVector")
    return merged


def _unite(vectors: Sequence[TaskVector]) -> TaskVector:
    """Sum the changes of all parts. Only dense parts have a weight in common with another part."""
    return vectors[0] if len(vectors) == 1 else combine(vectors, torch.ones(len(vectors)))


def _copy_model(model: Any, dtype: str, device: str | None) -> Any:
    """Copy a model that the caller loaded, without its tensors; refuse another dtype or device."""
    found, wanted = (
        model.device,
        torch.device(device if device and device != AUTO else model.device),
    )
    # A device without an index, such as cuda, means every device of its type.
    elsewhere = wanted.type != found.type or wanted.index not in (None, found.index or 0)
    if str(model.dtype) != f"torch.{dtype}" or elsewhere:
        raise UsageError(
            f"the loaded base is {model.dtype} on {model.device}, and the composition needs "
            f"{dtype} on {device or 'any device'}",
            "load the base with that dtype and on that device, or remove model=",
        )
    return _copy_modules(model).eval()


def _copy_modules(module: Any, made: dict[int, Any] | None = None) -> Any:
    """Copy a tree of modules; the copy shares every parameter and buffer with the original."""
    made = {} if made is None else made
    if id(module) not in made:
        clone = made[id(module)] = copy.copy(module)
        # The copy gets its own dicts (parameters, buffers, children, hooks), which may be changed.
        own = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}
        own["_modules"] = {
            name: None if child is None else _copy_modules(child, made)
            for name, child in module._modules.items()
        }
        vars(clone).update(own)
    return made[id(module)]


def _add(model: Any, merged: TaskVector, plan: Plan) -> None:
    """Add a task vector to the weights of a model."""
    tied = untie(model, merged, plan.adapted)
    places = find_uses(model, merged)
    for name in merged:
        if len(places[name]) > 1 and name in plan.separate:
            raise HubError(
                f"{name} belongs to {len(places[name])} modules, and an adapter changes one of them",
                "leave it out with targets:, or merge the adapter with peft and use hub diff",
            )
        # The sum is a new tensor: the base's weights are mapped from its file, and may be shared.
        changed = add_change(model.get_parameter(name), merged[name], name, plan.dtype)
        parameter = nn.Parameter(changed, requires_grad=False)
        for module, leaf in places[name]:
            module.register_parameter(leaf, parameter)
    if tied is not None:
        tie_again(model, tied)


def add_change(weight: Tensor, change: Delta, name: str, dtype: str) -> Tensor:
    """Add a change to a weight.

    Args:
        weight: The weight; it is not changed.
        change: The change.
        name: The name of the weight, for the error.
        dtype: The dtype of the model, for the error.

    Returns:
        The sum, in the weight's dtype.

    Raises:
        IntegrityError: The sum overflows.
    """
    changed = change.add_to(weight)
    # The sum over a tensor with an entry that is not finite is not finite either. It may also
    # overflow over finite entries, so every entry is tested only in that case.
    if not math.isfinite(changed.sum()) and not bool(torch.isfinite(changed).all()):
        raise IntegrityError(
            f"{name} overflows {dtype}", "use smaller weights, or set dtype: float32"
        )
    return changed
