"""Routes: they replace modules of a model with routed modules, and restore them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.composition.bank import Bank, NamedGroup
from experthub.hub.composition.forward_hooks import Watch
from experthub.hub.composition.kernels import choose_kernels
from experthub.hub.composition.rows import RouteHook
from experthub.hub.composition.selection import TextReader, make_selection
from experthub.hub.composition.skills import (
    TaskSelection,
    add_to_modules,
    check_skills,
    fold_task,
    load_inventory,
    stack_tasks,
)
from experthub.hub.composition.stacking import Stacking
from experthub.hub.composition.weight_reads import WeightReads
from experthub.hub.composition.weights import Contents
from experthub.hub.composition.whole_prompts import split_prompts
from experthub.hub.errors import UsageError, explain_errors
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session
from experthub.hub.store.store import Store
from experthub.merge import TaskVector, find_weight_reads
from experthub.routing import (
    FLOAT32_CPU_KERNELS,
    Context,
    Kernel,
    ModelRouter,
    RoutedLinear,
    State,
    attach_experts,
    parse_kernel,
)
from torch import nn


@dataclass
class Routes:
    """The changes that a route made to a model.

    Args:
        watch: The hooks around the model's forward pass, which all of its routes share.
        originals: The modules that were replaced, by path.
        folded: The task vector that was added to weights instead, for a route that is the same for
            every input.
        reads: The hooks around modules that read the weight of a routed module.
    """

    watch: Watch
    originals: dict[str, nn.Module] = field(default_factory=dict)
    folded: TaskVector | None = None
    reads: WeightReads = field(default_factory=WeightReads)

    def undo(self, model: Any) -> None:
        """Put the original modules back.

        Args:
            model: The composed model, which is changed in place.
        """
        self.watch.remove()
        self.reads.remove()
        split_prompts(model)
        for name, module in self.originals.items():
            model.set_submodule(name, module)
        self.originals.clear()


def route(
    model: Any,
    plan: Plan,
    contents: Contents,
    state: State | None,
    bank: Bank | None,
    session: Session,
    watch: Watch,
) -> Routes:
    """Replace every routed module of a model.

    Args:
        model: The transformers model, which is changed in place.
        plan: A plan with one route.
        contents: The experts' files; not used if the bank is complete.
        state: The router's state; None for a router without state.
        bank: The bank from which the packed experts are read, and into which they are written if it
            is not complete. None packs them in memory.
        session: The store, the registry for an embedder, and the progress callback.
        watch: The hooks around the model's forward pass, which all of its routes share.

    Returns:
        The changes, which can be undone.

    Raises:
        UsageError: The kernel or the router does not fit the model.
        IntegrityError: The bank is damaged.
    """
    kernel, reads = _check_kernel(model, plan), find_weight_reads(model)
    if plan.skilled:
        routes = _route_skills(model, plan, contents, session.store, watch)
    else:
        routes = _route_experts(model, plan, contents, state, bank, session, watch, kernel)
    if routes.folded is None:
        own = {path: read for path, read in reads.items() if path in routes.originals}
        routes.reads = WeightReads.attach(model, own)
    return routes


def _route_experts(
    model: Any,
    plan: Plan,
    contents: Contents,
    state: State | None,
    bank: Bank | None,
    session: Session,
    watch: Watch,
    kernel: Kernel | None,
) -> Routes:
    """Route over experts; see `route`."""
    method, state = plan.recipe.method, state or State()
    routes, context = Routes(watch), _make_context(watch, plan)
    select = make_selection(model, plan, state, session)
    modules = dict(model.named_modules())

    def pack() -> Iterator[NamedGroup]:
        # A bank stores probes apart from the experts' factors, and lies on the CPU.
        like = torch.empty(0, dtype=model.dtype) if bank else None
        stacking = Stacking(plan, modules, contents, state, select, context, model.dtype, like)
        return stacking.pack_groups(session.report)

    groups = []
    for names, packed in bank.load_groups(pack, context) if bank else pack():
        bases = [modules[name] for name in names]
        with explain_errors(names[0]):
            linears = attach_experts(bases, packed, method.combine, kernel, context, model.dtype)
        for name, linear in zip(names, linears, strict=True):
            owner, _, leaf = name.rpartition(".")
            setattr(modules[owner], leaf, linear)
            routes.originals[name] = modules[name]
        groups.append(linears[0].group)
    if kernel is None:
        choose_kernels(groups)
    if select is not None or any(group.packed.router.pooled for group in groups):
        _attach(watch, model, plan, RouteHook(context, select))
    return routes


def _make_context(watch: Watch, plan: Plan) -> Context:
    """Link a route to its model. Its name is the same in every model of the recipe.

    A key/value cache has the decisions of routes by their names.
    """
    return Context(watch.passes, f"{plan.digest} {plan.parameters[0]}")


def _check_kernel(model: Any, plan: Plan) -> Kernel | None:
    """Return the kernel that the recipe sets; None chooses the fastest."""
    method = plan.recipe.method
    kernel = None if method.kernel == "auto" else parse_kernel(method.kernel)
    if kernel in FLOAT32_CPU_KERNELS and (plan.dtype != "float32" or model.device.type != "cpu"):
        raise UsageError(
            f"kernel: {method.kernel} is for float32 on a CPU, "
            f"and this is {plan.dtype} on {model.device}",
            "remove kernel:, or set kernel: auto",
        )
    return kernel


def _route_skills(model: Any, plan: Plan, contents: Contents, store: Store, watch: Watch) -> Routes:
    """Fold an inventory of skills into the weights for one task, or route over all its tasks."""
    inventory = load_inventory(plan, contents, store)
    check_skills(plan, inventory.record)
    known = inventory.record.tasks
    task = known[0] if plan.task is None and len(known) == 1 else plan.task
    routes = Routes(watch)
    if task is not None:
        routes.folded = fold_task(plan, inventory, task)
        routes.originals = add_to_modules(model, routes.folded)
        return routes
    if not plan.base.reads_rows:
        raise UsageError(
            f"{plan.base.name} is a {type(model).__name__}, which cannot choose the skills of "
            f"{plan.experts[0].label} for each example",
            f"set task: to one task of the inventory, such as {known[0]}",
        )
    context = _make_context(watch, plan)
    for name, stack in stack_tasks(plan, inventory):
        module = model.get_submodule(name)
        router = ModelRouter(context, stack.experts, stack.n_experts)
        linear = RoutedLinear.from_stack(module, stack, router, "outputs", context=context)
        model.set_submodule(name, linear)
        routes.originals[name] = module
    select = TaskSelection(tuple(known))
    watch.attach(model, RouteHook(context, select, n_experts=len(known) + 1))
    return routes


def _attach(watch: Watch, model: Any, plan: Plan, hook: RouteHook) -> None:
    """Hook the model for a router that needs more than the inputs of modules."""
    method = plan.recipe.method
    if hook.select is not None:
        hook.by_token = method.strategy.traits.routing.input == "token"
        if method.strategy.needs_own_tasks:
            hook.read_texts = TextReader(load_tokenizer(plan.base))
        if hook.read_texts is not None or "task" in method.strategy.needs:
            hook.n_experts = len(plan.experts)
    watch.attach(model, hook)
