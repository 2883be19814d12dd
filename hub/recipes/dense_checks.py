"""Checks of the dense parts of a recipe's experts: heads, embeddings and biases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.building import refuse_missing
from experthub.hub.errors import HubError, UsageError
from experthub.hub.recipes.planned_experts import PlannedExpert
from experthub.hub.recipes.recipe import Recipe


def check_dense_parts(recipe: Recipe, experts: Sequence[PlannedExpert], base: Base) -> None:
    """Check the key `dense_parts`, and that the experts bring along what the base lacks.

    Args:
        recipe: The recipe.
        experts: Its experts.
        base: The base.

    Raises:
        UsageError: `dense_parts` names no expert, or one without dense parts.
        IntegrityError: The base lacks weights that no expert brings along.
        HubError: Experts bring along different weights.
    """
    chosen = list(experts)
    if recipe.dense_parts is not None:
        chosen = [expert for expert in experts if expert.label == recipe.dense_parts]
        if not chosen:
            raise UsageError(
                f"dense_parts: the recipe has no expert named {recipe.dense_parts!r}",
                f"name one of {', '.join(expert.label for expert in experts)}",
            )
        if not _list_parts(chosen[0]):
            raise UsageError(
                f"dense_parts: {recipe.dense_parts} has no dense parts",
                "name an expert with a head or an embedding of its own, or remove dense_parts:",
            )
    given = {name for expert in chosen for name in _list_parts(expert)}
    refuse_missing(base, base.lacks - given)
    for expert in chosen if base.lacks else ():
        own = _record_parts(expert, base.lacks)
        if recipe.dense_parts is None and own != _record_parts(chosen[0], base.lacks):
            raise _refuse_different(chosen[0], expert, min(base.lacks), "the base lacks it")


def check_equal_parts(
    recipe: Recipe, experts: Sequence[PlannedExpert], dense: Sequence[str]
) -> None:
    """Check that the experts of a route have equal dense parts, or that one expert is named.

    Args:
        recipe: A recipe of one method.
        experts: The experts.
        dense: The parameters that are taken from one expert.

    Raises:
        HubError: The experts have different dense parts.
    """
    if recipe.dense_parts is not None:
        return
    for expert in experts[1:]:
        for name in dense:
            if _record_parts(expert, [name]) != _record_parts(experts[0], [name]):
                raise _refuse_different(
                    experts[0], expert, name, "a route chooses low-rank parts only"
                )


def _refuse_different(one: PlannedExpert, other: PlannedExpert, name: str, why: str) -> HubError:
    """Make the error for two experts whose dense parts differ."""
    return HubError(
        f"{one.label} and {other.label} have different {name}, and {why}",
        f"set dense_parts: {one.label} or dense_parts: {other.label} to take the dense parts of one expert",
    )


def _list_parts(expert: PlannedExpert) -> set[str]:
    """List the parameters that have dense parts in an expert."""
    return {name for member in expert.members for name in member.footprint.dense}


def _record_parts(expert: PlannedExpert, names: Iterable[str]) -> Any:
    """Return what decides an expert's dense parts of some parameters."""
    own = [
        [
            [(p.way, p.rows, p.scale, p.shape, p.digest) for p in member.footprint.dense.get(n, ())]
            for n in sorted(names)
        ]
        for member in expert.members
    ]
    alike = expert.merge is None or len({str(parts) for parts in own}) == 1
    return own[0] if alike else [own, expert.content]
