"""The materials of a plan's method, for each kind of method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from experthub.hub.materials.merge_materials import open_merge_materials
from experthub.hub.materials.router_materials import RouterMaterials
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session


@contextmanager
def _open_router_materials(plan: Plan, session: Session) -> Iterator[RouterMaterials]:
    """Offer what a router may ask for."""
    yield RouterMaterials(plan, session)


KINDS: Mapping[str, Callable[[Plan, Session], AbstractContextManager[Any]]] = {
    "merge": open_merge_materials,
    "route": _open_router_materials,
}


def open_materials(plan: Plan, session: Session) -> AbstractContextManager[Any]:
    """Offer what a plan's method may ask for when it prepares its state.

    Args:
        plan: A plan of one method.
        session: The store, the registry, the device and the progress callback.

    Returns:
        A context manager whose value is `merge.Materials` or `routing.Materials`.
    """
    return KINDS[plan.recipe.method.kind](plan, session)
