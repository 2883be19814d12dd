"""Recipes that the hub writes for a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experthub.hub.errors import ConflictError, UsageError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_text
from experthub.hub.files.path_checks import check_file
from experthub.hub.files.spelling import suggest_name
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.registry.expert import Reference
from experthub.hub.session import Session


def check_request(
    path: Path | None, force: bool, method: str | None, routes_only: bool = False
) -> None:
    """Refuse what could not be written, before anything is read.

    Raises ConflictError for a file that is there, unless `force` says that it may be replaced;
    UsageError for what can be no file, and for an unknown method, see `way_of`.
    """
    if method is not None:
        way_of(method, routes_only)
    if path is None:
        return
    check_file(path)
    if path.exists() and not force:
        raise ConflictError(f"{path} exists", "name another file, or say --force to replace it")


def way_of(method: str, routes_only: bool = False) -> dict[str, Any]:
    """The part of a recipe that names a method: `{"route": ...}` or `{"merge": ...}`.

    Raises UsageError for a name that no catalogue has, and for a merge where only a route will do.
    """
    from experthub.merge import merges
    from experthub.routing import routers

    if method in routers:
        return {"route": {"method": method}}
    if method in merges and not routes_only:
        return {"merge": {"method": method}}
    known = [*routers, *([] if routes_only else merges)]
    kind = "router" if routes_only else "method"
    raise UsageError(f"there is no {kind} {method!r}", suggest_name(method, known))


def write_recipe(
    path: Path,
    recipe: dict[str, Any],
    comment: str,
    session: Session,
) -> Plan:
    """Check that a recipe resolves, and write it.

    Args:
        path: The recipe file to write.
        recipe: The recipe as plain values with absolute folders. Folders below the file's folder are
            written relative to it.
        comment: One line above the recipe.
        session: The registry, the store and the progress callback.

    Returns:
        The recipe's plan.

    Raises:
        HubError: The recipe does not resolve.
    """
    plan = resolve(Recipe.of(recipe), session=session)
    near = path.resolve().parent
    experts = [_placed(entry, near) for entry in recipe["experts"]]
    placed = {**recipe, "base": _near(recipe["base"], near), "experts": experts}
    write_text(path, f"# {comment}\n{yaml_files.dump(placed)}")
    return plan


def method_for(plan: Plan) -> str:
    """The first of phatgoose, arrow and linear for which a plan's experts have what is needed."""
    if not all(expert.low_rank for expert in plan.experts):
        return "linear"
    gated = [
        {name.removesuffix(".weight") for name in member.changes} <= member.gated
        for member in plan.members
    ]
    return "phatgoose" if all(gated) else "arrow"


def _placed(entry: Any, near: Path) -> Any:
    if isinstance(entry, str):
        return _near(entry, near)
    if "merge" in entry:
        return {**entry, "experts": [_placed(inner, near) for inner in entry["experts"]]}
    return {**entry, "expert": _near(entry["expert"], near)}


def _near(text: str, folder: Path) -> str:
    """A reference as it is written into a file of a folder."""
    place = Reference.parse(text).folder
    if place is None:
        return text
    place = place.resolve()
    return f"./{place.relative_to(folder)}" if place.is_relative_to(folder) else str(place)
