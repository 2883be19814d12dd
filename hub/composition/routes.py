"""Putting routed experts beside the modules of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from experthub.hub.composition.bank import Bank, Part
from experthub.hub.composition.choosing import attach, by_task
from experthub.hub.composition.forward_hooks import Watch
from experthub.hub.composition.kernels import tune
from experthub.hub.composition.skills import (
    by_row,
    check_skills,
    fold_into,
    folded,
    inventory_of,
    stacks,
    task_of,
)
from experthub.hub.composition.weights import Contents, gates, task_vector
from experthub.hub.errors import HubError, UsageError, explained
from experthub.hub.materials.router_state import State, state_of
from experthub.hub.progress import Report
from experthub.hub.recipes.plan import Plan, layer_of
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from experthub.merge import LowRank, TaskVector
from experthub.routing import (
    Context,
    ExpertStack,
    Packed,
    Pool,
    RoutedLinear,
    Router,
    Select,
    Selected,
    routed,
    together,
)
from torch import Tensor, nn

# Leaves of modules of one parent that read the same input, in the usual architectures.
SHARING = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"q", "k", "v"},
    {"gate_proj", "up_proj"},
    {"wi_0", "wi_1"},
    {"w1", "w3"},
)


@dataclass
class Routes:
    """What routing changed in a model: its original modules by name, and the hooks around it.

    folded: what was added to weights, of a route that is the same for every input.
    """

    originals: dict[str, nn.Module] = field(default_factory=dict)
    watch: Watch = field(default_factory=lambda: Watch(Context()))
    folded: TaskVector | None = None

    def undo(self, model: Any) -> None:
        """Put the original modules back."""
        self.watch.remove()
        for name, module in self.originals.items():
            model.set_submodule(name, module)
        self.originals.clear()


def router_state(
    plan: Plan, registry: Registry | None, store: Store, device: str | None, report: Report
) -> State:
    """The state that a plan's router needs besides the experts, made now if it has to be."""
    if not plan.learns:
        return State({})

    def made() -> State:
        from experthub.hub.materials.router_making import make

        return make(plan, device, registry, store, report)

    return state_of(plan, store, made)


def route(
    model: Any,
    plan: Plan,
    contents: Contents,
    store: Store,
    state: State,
    bank: Bank | None,
    registry: Registry | None,
    report: Report,
) -> Routes:
    """Replace every routed module.

    state: of the router, see `router_state`.  bank: where the experts are packed, or will be.
    """
    method = plan.recipe.method
    kernel = None if method.kernel == "auto" else method.kernel
    if kernel in ("sampled", "screened") and (
        plan.dtype != "float32" or model.device.type != "cpu"
    ):
        raise UsageError(
            f"kernel: {kernel} is for float32 on a CPU, and this is {plan.dtype} on {model.device}",
            "leave kernel out: auto takes what there is",
        )
    if plan.skilled:
        return _over_skills(model, plan, contents, store)
    routes = Routes()
    context = routes.watch.context
    select = _selection(plan, state)
    modules = dict(model.named_modules())

    def stacked() -> Iterator[Part]:
        return _stacked(modules, plan, contents, state, select, context, report)

    parts = bank.parts(stacked, model.dtype, context) if bank else stacked()
    groups = []
    for names, packed in parts:
        bases = [modules[name] for name in names]
        with explained(names[0]):
            linears = routed(bases, packed, method.combine, kernel, context)
        for name, linear in zip(names, linears, strict=True):
            owner, _, leaf = name.rpartition(".")
            setattr(modules[owner], leaf, linear)
            routes.originals[name] = modules[name]
        groups.append(linears[0].group)
    if kernel is None:
        tune(groups)
    if select is not None or any(group.router.pooled for group in groups):
        attach(routes.watch, model, plan, state, select, registry, report)
    return routes


def _over_skills(model: Any, plan: Plan, contents: Contents, store: Store) -> Routes:
    """An inventory of skills: folded into the weights for one task, or a LoRA for every task."""
    inventory = inventory_of(plan, contents, store)
    check_skills(plan, inventory.record)
    task = task_of(plan, inventory.record)
    routes = Routes()
    if task is not None:
        routes.folded = folded(plan, inventory, task)
        routes.originals = fold_into(model, routes.folded)
        return routes
    context = routes.watch.context
    for name, stack in stacks(plan, inventory):
        module = model.get_submodule(name)
        router = Selected(context, stack.experts, stack.n_experts)
        linear = RoutedLinear.alone(module, stack, router, "outputs", context=context)
        model.set_submodule(name, linear)
        routes.originals[name] = module
    routes.watch.choose = by_task(by_row(inventory.record))
    routes.watch.attach(model)
    return routes


def _stacked(
    modules: Mapping[str, nn.Module],
    plan: Plan,
    contents: Contents,
    state: State,
    select: Select | None,
    context: Context,
    report: Report,
) -> Iterator[Part]:
    """All groups of modules, their experts and routers, from the stored experts."""
    method = plan.recipe.method
    vectors = [task_vector(expert, plan, contents) for expert in plan.experts]
    inputs = [_inputs_of(e, plan, state, contents) for e in range(len(plan.experts))]
    shared = sharing([name.removesuffix(".weight") for name in plan.parameters])
    for number, names in enumerate(shared, 1):
        report("stacking experts", number, len(shared))
        stacks: list[ExpertStack] = []
        found: list[Router] = []
        for name in names:
            here = [e for e, vector in enumerate(vectors) if f"{name}.weight" in vector.load]
            deltas = {
                e: for_module(name, modules[name], vectors[e], plan.experts[e].weight) for e in here
            }
            width = next(iter(deltas.values())).shape[1]
            own = {e: inputs[e].get(name, torch.zeros(width)) for e in here}
            with explained(name):
                stack = ExpertStack.of(deltas, len(vectors), own if any(inputs) else None)
                stacks.append(stack.less(plan.general) if plan.general else stack)
                if select is None:
                    found.append(method.strategy.call(stacks[-1], **method.options))
                else:
                    layer = _layer(name, plan)
                    found.append(Selected(context, stacks[-1].experts, len(vectors), layer))
        for places in together(stacks, found, method.combine):
            packed = Packed.of([stacks[i] for i in places], [found[i] for i in places])
            yield [names[i] for i in places], packed


def _layer(name: str, plan: Plan) -> int | None:
    """Whose weights a module takes, where the layers of the model have their own."""
    if plan.recipe.method.strategy.routing.input != "token":
        return None
    layerwise = plan.recipe.method.options.get("layerwise", True)
    return plan.layers.index(layer_of(name)) if layerwise else 0


def _selection(plan: Plan, state: State) -> Select | None:
    """How a router that decides for the whole model does so; None for one that does not."""
    method = plan.recipe.method
    if method.strategy.routing.depth == "module":
        return None
    pool = Pool(
        tuple(expert.label for expert in plan.experts),
        tuple(tuple(m.task for m in e.members if m.task) for e in plan.experts),
        state.tensors,
    )
    select: Select = method.strategy.call(pool, **method.options)
    return select


def _inputs_of(expert: int, plan: Plan, state: State, contents: Contents) -> Mapping[str, Tensor]:
    """Module -> the vector `[I]` of one expert that its router goes by: a gate, a mean activation."""
    needs = plan.recipe.method.strategy.needs
    if "gates" in needs:
        return gates(plan.experts[expert], contents)
    if "activations" in needs:
        start = f"{expert}."
        return {n.removeprefix(start): t for n, t in state.tensors.items() if n.startswith(start)}
    return {}


def sharing(names: Sequence[str]) -> list[list[str]]:
    """Modules by the input that they are likely to share, in their order; most stand alone.

    Modules that turn out to read several inputs are only slower for it.
    """
    found: dict[tuple[str, int | str], list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        kind = next((i for i, leaves in enumerate(SHARING) if leaf in leaves), leaf)
        found.setdefault((owner, kind), []).append(name)
    return list(found.values())


def for_module(name: str, module: nn.Module, vector: TaskVector, weight: float) -> LowRank:
    """The change of a linear module as A `[R, I]` and B `[O, R]`, however its weight is stored."""
    delta = vector[f"{name}.weight"].scaled(weight)
    if not isinstance(delta, LowRank):
        raise HubError(
            f"the change of {name} is dense, and a route needs low-rank experts",
            "give the nested merge a rank, or use merge: instead of route:",
        )
    if not is_linear(module):
        raise HubError(
            f"{name} is a {type(module).__name__}, and only linear modules can be routed",
            "leave it out with targets:, or use merge: instead of route:",
        )
    if type(module).__name__ == "Conv1D":
        return LowRank(delta.b.T.contiguous(), delta.a.T.contiguous(), delta.scale)
    return delta


def is_linear(module: nn.Module) -> bool:
    """Whether a module can be routed: a linear layer, however its weight is stored."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
