"""Checks that a recipe's method can work with its experts, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from functools import cached_property

from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError, UsageError, explain_errors
from experthub.hub.files.patterns import limit_matching_time
from experthub.hub.recipes.method import Method
from experthub.hub.recipes.planned_experts import Member, PlannedExpert
from experthub.hub.recipes.recipe import Recipe
from experthub.merge import Outline
from experthub.routing import routers


def check_disjoint(recipes: Sequence[Recipe], targets: Sequence[tuple[str, ...]]) -> None:
    """Check that no two parts change the same module.

    Args:
        recipes: The recipe of each part.
        targets: The parameters that each part changes.

    Raises:
        UsageError: A module belongs to two parts.
    """
    owner: dict[str, str | None] = {}
    for recipe, names in zip(recipes, targets, strict=True):
        for name in names:
            if name in owner:
                raise UsageError(
                    f"{name.rpartition('.')[0]} belongs to two parts: "
                    f"{owner[name]} and {recipe.targets}",
                    "write patterns that do not overlap",
                )
            owner[name] = recipe.targets


def check_method(
    recipe: Recipe,
    experts: tuple[PlannedExpert, ...],
    parameters: tuple[str, ...],
    base: Base,
) -> None:
    """Check that the recipe's method can work with its experts.

    Args:
        recipe: A recipe of one method.
        experts: The experts of the recipe.
        parameters: The names of the parameters that the method may change.
        base: The base.

    Raises:
        UsageError: The method, its options and the experts do not go together.
        HubError: An expert lacks what the method needs, or changes what cannot be routed.
    """
    _check_skills(recipe, experts)
    outline = Outline([_OutlinedExpert(expert) for expert in experts], parameters)
    if recipe.route is not None:
        _check_route(recipe.route, experts, outline, base)
    check, options = recipe.method.strategy.check, recipe.method.options
    if check is None:
        return
    try:
        with explain_errors(), limit_matching_time():
            check(outline, options)
    except TimeoutError as error:
        raise UsageError(str(error), "simplify the pattern, or use a name") from None


class _OutlinedExpert:
    """A planned expert, as a method sees it before weights are read."""

    def __init__(self, expert: PlannedExpert) -> None:
        self.expert = expert
        self.label, self.weight = expert.label, expert.weight
        self.is_merge = expert.merge is not None

    @cached_property
    def _ranks(self) -> dict[str, int]:
        sums: dict[str, int] = {}
        for member in self.expert.members:
            for adapted in member.adapted:
                name = adapted.parameter
                sums[name] = sums.get(name, 0) + adapted.rank
        limit = self.expert.rank
        return {name: min(rank, limit or rank) for name, rank in sums.items()}

    def rank_of(self, parameter: str) -> int | None:
        """Return the rank of the expert's change of a parameter; None if it has no such change."""
        return self._ranks.get(parameter)


def _check_route(
    route: Method, experts: tuple[PlannedExpert, ...], outline: Outline, base: Base
) -> None:
    """Refuse experts that cannot be routed, or that lack a gate."""
    wanted, needs = frozenset(outline.parameters), route.strategy.needs
    complete: set[tuple[int, int]] = set()  # Many experts share their shapes.
    for expert in experts:
        if not expert.low_rank:
            raise UsageError(
                f"expert {expert.label} is dense, and a route needs low-rank experts",
                "give its merge a rank, or use merge: instead of route:"
                if expert.merge is not None
                else "make a LoRA of its source with hub convert --rank or hub diff --rank, "
                "or use merge: instead of route:",
            )
        for member in expert.members:
            shape = id(member.changes), id(member.gated)
            if "gates" in needs and shape not in complete:
                _check_gates(member, route.method, wanted)
                complete.add(shape)
    adapted = {id(m.adapted): m.adapted for e in experts for m in e.members}
    embedding = [
        a.module for one in adapted.values() for a in one if a.embedding and a.parameter in wanted
    ]
    if embedding:
        raise HubError(
            f"{embedding[0]} is an embedding, and only linear modules can be routed",
            "leave it out with targets:, or use merge: instead of route:",
        )
    _check_linear(outline.parameters, base.names.linear.keys())
    _check_reached(route, outline.parameters, base)
    if route.combine == "parameters":
        _check_equal_ranks(outline)


def _check_reached(route: Method, parameters: Sequence[str], base: Base) -> None:
    """Refuse modules that the base never calls, and a base whose rows the router would not know."""
    uncalled = [n for n in parameters if n.removesuffix(".weight") in base.names.uncalled]
    if uncalled:
        raise HubError(
            f"{uncalled[0].removesuffix('.weight')} cannot be routed: {base.architecture} reads its "
            "weight, and never calls the module",
            "leave it out with targets:, or use merge: instead of route:",
        )
    routing = route.strategy.traits.routing
    whole = routing.depth == "model" or routing.input == "example"
    if whole and "skills" not in route.strategy.needs and not base.reads_rows:
        raise UsageError(
            f"{route.method} chooses for whole examples of a language model or an encoder, and "
            f"{base.name} is a {base.architecture}",
            "use another base, or a router that chooses for each token at every module",
        )


def _check_linear(parameters: Sequence[str], linear: Set[str]) -> None:
    """Refuse parameters that belong to no linear module, such as the experts of a fused mixture."""
    weights = {f"{module}.weight" for module in linear}
    others = [name for name in parameters if name not in weights]
    if others:
        leaves = sorted({name.split(".")[-2] for name in parameters if name in weights})
        targets = "|".join(map(re.escape, leaves))
        raise HubError(
            f"{others[0]} is not the weight of a linear module, and a route can only add experts "
            "to the output of linear modules",
            f"set targets: '.*[.]({targets})' to leave it out, or use merge: instead of route:"
            if leaves
            else "use merge: instead of route:",
        )


def _check_gates(member: Member, method: str, wanted: frozenset[str]) -> None:
    """Refuse an expert without a gate for a module that it adapts."""
    modules = {n.removesuffix(".weight") for n in member.changes if n in wanted}
    if missing := sorted(modules - member.gated.keys()):
        raise HubError(
            f"expert {member.reference} has no gate for {missing[0]}, which {method} needs",
            f"run hub train gate {member.reference}"
            if member.task and "/" not in member.reference
            else "register it (hub add --task), then run hub train gate",
        )


def _check_skills(recipe: Recipe, experts: tuple[PlannedExpert, ...]) -> None:
    """Check that a router over skills has exactly one inventory, and that other methods have none."""
    inventories = [m.reference for e in experts for m in e.members if m.skill_tasks]
    needs = "skills" in recipe.method.strategy.needs
    if needs and (len(inventories) != 1 or len(experts) != 1):
        raise UsageError(
            f"{recipe.method.method} needs exactly one inventory of skills, but the recipe has "
            f"{len(inventories)} among its {len(experts)} experts",
            "list one inventory that hub train skills made under experts:, and no other expert",
        )
    if inventories and not needs:
        over = [name for name, s in routers.items() if "skills" in s.needs]
        raise UsageError(
            f"{inventories[0]} is an inventory of skills, which {recipe.method.method} cannot use",
            f"use a route over it alone, with one of the methods {', '.join(over)}",
        )


def _check_equal_ranks(outline: Outline) -> None:
    """Refuse experts of several ranks at one module."""
    for name in outline.parameters:
        ranks = outline.describe_ranks(name)
        if ranks is not None:
            raise HubError(
                f"combine: parameters needs one rank, and {name.removesuffix('.weight')} has {ranks}",
                "use combine: outputs",
            )
