"""The parameters that each method of a recipe changes, and those that are taken from one expert."""

from __future__ import annotations

import re
from collections.abc import Sequence

from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.patterns import limit_matching_time
from experthub.hub.recipes.compatibility import check_disjoint, check_method
from experthub.hub.recipes.dense_checks import check_equal_parts
from experthub.hub.recipes.planned_experts import PlannedExpert, count_virtual_tokens
from experthub.hub.recipes.recipe import Recipe

Names = tuple[str, ...]


def divide_parameters(
    recipes: Sequence[Recipe], experts: tuple[PlannedExpert, ...], base: Base
) -> list[tuple[Names, Names]]:
    """Find the parameters that each recipe changes, and check that its method can change them.

    Args:
        recipes: The recipe of each part.
        experts: The experts.
        base: The base.

    Returns:
        For each recipe, the parameters that its method changes, and the parameters with dense parts
        that are taken from one expert.

    Raises:
        UsageError: A parameter belongs to two parts, or the method does not go with the experts.
        HubError: The targets match nothing, or an expert lacks what a method needs.
    """
    if count_virtual_tokens(experts, routed=False):
        return [((), ()) for _ in recipes]
    targets = [_find_targets(one, experts) for one in recipes]
    check_disjoint(recipes, targets)
    places = [_separate_dense(one, experts, own) for one, own in zip(recipes, targets, strict=True)]
    for one, (parameters, dense) in zip(recipes, places, strict=True):
        check_method(one, experts, parameters, base)
        check_equal_parts(one, experts, dense)
    return places


def _separate_dense(
    recipe: Recipe, experts: tuple[PlannedExpert, ...], targets: tuple[str, ...]
) -> tuple[Names, Names]:
    """Separate the parameters that the method changes from those that are taken from one expert."""
    if recipe.route is None and recipe.dense_parts is None:
        return targets, ()
    members = [member for expert in experts for member in expert.members]
    own: set[str] = set().union(*(member.own_changes for member in members))
    dense: set[str] = set().union(*(member.footprint.dense for member in members))
    return tuple(n for n in targets if n in own), tuple(n for n in targets if n in dense)


def _find_targets(recipe: Recipe, experts: tuple[PlannedExpert, ...]) -> tuple[str, ...]:
    """Find the parameters that the recipe changes."""
    shapes = {id(m.changes): m.changes for expert in experts for m in expert.members}
    names = sorted({name for changes in shapes.values() for name in changes})
    if recipe.targets is None:
        return tuple(names)
    try:
        with limit_matching_time():
            chosen = [n for n in names if re.fullmatch(recipe.targets, n.rpartition(".")[0])]
    except TimeoutError as error:
        raise UsageError(f"targets {recipe.targets!r}: {error}", "simplify the pattern") from None
    if not chosen:
        raise HubError(
            f"targets {recipe.targets!r} matches no module that the experts change",
            f"match a module that they change, such as {names[0].rpartition('.')[0]}",
        )
    return tuple(chosen)
