"""Stacks of a plan's experts, from which the router of each group of modules is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from experthub.hub.composition.bank import NamedGroup
from experthub.hub.composition.weights import Contents, load_gates, load_task_vector
from experthub.hub.errors import HubError, explain_errors
from experthub.hub.progress import Report
from experthub.hub.recipes.plan import Plan, find_layer
from experthub.merge import LowRank, TaskVector, is_linear, make_like, orient
from experthub.routing import (
    Context,
    ExpertStack,
    ModelRouter,
    Router,
    Select,
    State,
    StateTensors,
    group_modules,
    pack_experts,
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


@dataclass(frozen=True)
class Stacking:
    """The experts of a plan, stacked for the modules of a model.

    Args:
        plan: A plan with one route.
        modules: The modules of the model by path.
        contents: The experts' files.
        state: The state of the router.
        select: The router, if it decides once for the whole model.
        context: The facts about the current batch that routers read.
        dtype: The dtype of the model, for modules whose weights are quantised.
        like: A tensor whose dtype and device the packed experts get. None takes those of the
            module's weight, and places the probes below the experts' A, so that one product serves
            both.
    """

    plan: Plan
    modules: Mapping[str, nn.Module]
    contents: Contents
    state: State
    select: Select | None
    context: Context
    dtype: torch.dtype
    like: Tensor | None

    def pack_groups(self, report: Report) -> Iterator[NamedGroup]:
        """Pack the experts of all modules, group after group.

        Args:
            report: A progress callback.

        Yields:
            The paths of the modules of a group, and their packed experts.

        Raises:
            UsageError: The router cannot be made of these experts.
            HubError: A change is dense, or a module is not linear.
        """
        plan, contents = self.plan, self.contents
        vectors = [load_task_vector(expert, plan, contents) for expert in plan.experts]
        gated = "gates" in plan.recipe.method.strategy.needs
        own = [load_gates(expert, contents) for expert in plan.experts] if gated else None
        shared = group_by_input([name.removesuffix(".weight") for name in plan.parameters])
        for number, names in enumerate(shared, 1):
            report("stacking experts", number, len(shared))
            stacks = [self._stack(name, vectors, own) for name in names]
            pairs = zip(names, stacks, strict=True)
            found = [self._make_router(name, stack) for name, stack in pairs]
            for places in group_modules(stacks, found, plan.recipe.method.combine):
                here = [stacks[i] for i in places], [found[i] for i in places]
                base: Any = self.modules[names[0]]
                like = make_like(base, self.dtype) if self.like is None else self.like
                packed = pack_experts(*here, like, fuse=self.like is None)
                yield [names[i] for i in places], packed

    def _stack(
        self,
        name: str,
        vectors: Sequence[TaskVector],
        own: Sequence[Mapping[str, Tensor]] | None,
    ) -> ExpertStack:
        """Stack the experts of one module, in the form that its router needs."""
        plan, strategy = self.plan, self.plan.recipe.method.strategy
        here = [e for e, vector in enumerate(vectors) if f"{name}.weight" in vector.load]
        module = self.modules[name]
        deltas = {e: load_change(name, module, vectors[e], plan.experts[e].weight) for e in here}
        width = next(iter(deltas.values())).shape[1]
        found = own and {e: own[e].get(name, torch.zeros(width)) for e in here}
        with explain_errors(name):
            stack = replace(
                ExpertStack.of(deltas, len(vectors), found or None),
                module=name,
                labels=tuple(expert.label for expert in plan.experts),
                state=StateTensors(self.state.tensors),
            )
            adapt = strategy.traits.adapt
            return stack if adapt is None else adapt(stack, plan.recipe.method.options)

    def _make_router(self, name: str, stack: ExpertStack) -> Router:
        """Make the router of one module."""
        plan, method = self.plan, self.plan.recipe.method
        if self.select is None:
            with explain_errors(name):
                router: Router = method.strategy.call(stack, **method.options)
                if not is_dataclass(router):
                    raise ValueError(f"returned {type(router).__name__}, expected a router")
                return router
        by_layer = method.strategy.traits.routing.input == "token"
        layer = plan.layers.index(find_layer(name)) if by_layer else None
        return ModelRouter(self.context, stack.experts, stack.n_experts, layer)


def group_by_input(names: Sequence[str]) -> list[list[str]]:
    """Group modules by the input that they are likely to share; most stand alone.

    Modules that turn out to read several inputs are only slower for it.

    Args:
        names: Paths of modules.

    Returns:
        The groups, in the order of their first modules.
    """
    found: dict[tuple[str, int | str], list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        kind = next((i for i, leaves in enumerate(SHARING) if leaf in leaves), leaf)
        found.setdefault((owner, kind), []).append(name)
    return list(found.values())


def load_change(name: str, module: nn.Module, vector: TaskVector, weight: float) -> LowRank:
    """Return the change of a linear module as A `[R, I]` and B `[O, R]`.

    Args:
        name: The path of the module.
        module: The module.
        vector: The task vector of an expert.
        weight: The factor of the change.

    Returns:
        The change, whatever the orientation in which the module stores its weight.

    Raises:
        HubError: The change is dense, or the module is not linear.
    """
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
    return orient(delta, module)
