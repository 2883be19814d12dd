"""Writing of recipes that the hub suggests to a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experthub.hub.errors import ConflictError, UsageError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_text
from experthub.hub.files.path_checks import check_file
from experthub.hub.files.safe_text import escape
from experthub.hub.files.spelling import suggest_name
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.registry.expert import Reference
from experthub.hub.session import Session
from experthub.merge import merges
from experthub.routing import routers


def check_recipe_file(
    path: Path | None, force: bool, method: str | None, routes_only: bool = False
) -> None:
    """Refuse a recipe that could not be written, before anything is read.

    Args:
        path: The recipe file to write; None if no recipe is wanted.
        force: Replace an existing file.
        method: The method of the recipe; None for a default.
        routes_only: Accept only routers.

    Raises:
        ConflictError: The file exists, and `force` is not set.
        UsageError: The path cannot be a file, or there is no such method.
    """
    if method is not None:
        build_method_entry(method, routes_only)
    if path is None:
        return
    check_file(path)
    if path.exists() and not force:
        raise ConflictError(f"{path} exists", "name another file, or pass --force to replace it")


def build_method_entry(method: str, routes_only: bool = False) -> dict[str, Any]:
    """Build the entry of a recipe that names a method.

    Args:
        method: The name of a router or a merge.
        routes_only: Accept only routers.

    Returns:
        `{"route": {"method": ...}}` or `{"merge": {"method": ...}}`.

    Raises:
        UsageError: There is no such method, or it is a merge where only routers are accepted.
    """
    if method in routers:
        return {"route": {"method": method}}
    if method in merges and not routes_only:
        return {"merge": {"method": method}}
    known = [*routers, *([] if routes_only else merges)]
    kind = "router" if routes_only else "method"
    raise UsageError(
        f"there is no {kind} {method!r}", suggest_name(method, known) or "run hub methods"
    )


def write_recipe(
    path: Path,
    recipe: dict[str, Any],
    comment: str,
    session: Session,
) -> Plan:
    """Check that a recipe resolves, and write it.

    Args:
        path: The recipe file to write.
        recipe: The recipe as plain values, with absolute folders. Folders below the file's folder
            are written as relative paths.
        comment: A comment of one line, which is written above the recipe.
        session: The registry, the store and the progress callback.

    Returns:
        The recipe's plan.

    Raises:
        HubError: The recipe does not resolve.
    """
    plan = resolve(Recipe.of(recipe), session=session)
    near = path.resolve().parent
    experts = [_shorten_folders(entry, near) for entry in recipe["experts"]]
    shortened = {**recipe, "base": _shorten_folder(recipe["base"], near), "experts": experts}
    write_text(path, f"# {escape(comment)}\n{yaml_files.dump(shortened)}")
    return plan


def choose_method(plan: Plan) -> str:
    """Choose a method that suits the experts of a plan.

    Args:
        plan: A plan.

    Returns:
        `phatgoose` if all experts have gates for every module, `linear` if an expert is dense, and
        `arrow` otherwise.
    """
    if not all(expert.low_rank for expert in plan.experts):
        return "linear"
    gated = [
        {name.removesuffix(".weight") for name in member.changes} <= member.gated.keys()
        for member in plan.members
    ]
    return "phatgoose" if all(gated) else "arrow"


def _shorten_folders(entry: Any, near: Path) -> Any:
    """Shorten every folder in an entry of `experts:`, nested merges included."""
    if isinstance(entry, str):
        return _shorten_folder(entry, near)
    if "merge" in entry:
        return {**entry, "experts": [_shorten_folders(inner, near) for inner in entry["experts"]]}
    return {**entry, "expert": _shorten_folder(entry["expert"], near)}


def _shorten_folder(text: str, folder: Path) -> str:
    """Write a reference to a folder as a relative path if it lies below another folder."""
    place = Reference.parse(text).folder
    if place is None:
        return text
    place = place.resolve()
    return f"./{place.relative_to(folder)}" if place.is_relative_to(folder) else str(place)
