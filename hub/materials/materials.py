"""The materials of a plan's method, for each kind of method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from experthub.hub.materials.merge_materials import open_merge_materials
from experthub.hub.materials.router_materials import PlanMaterials
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session


@contextmanager
def _open_router_materials(plan: Plan, session: Session) -> Iterator[PlanMaterials]:
    """Offer the materials of a router."""
    yield PlanMaterials(plan, session)


OPENERS: Mapping[str, Callable[[Plan, Session], AbstractContextManager[Any]]] = {
    "merge": open_merge_materials,
    "route": _open_router_materials,
}


def open_materials(plan: Plan, session: Session) -> AbstractContextManager[Any]:
    """Offer the materials from which a plan's method prepares its state.

    Args:
        plan: A plan of one method.
        session: The store, the registry, the device and the progress callback.

    Returns:
        A context manager whose value is `merge.MergeMaterials` or `routing.RouterMaterials`.
    """
    return OPENERS[plan.recipe.method.kind](plan, session)
