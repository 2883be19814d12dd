"""`hub lock` and `hub update`: pin what recipes use, so that they always give the same model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from experthub.cli import _completion
from experthub.cli._options import JsonOption, RegistryOption
from experthub.cli._output import print_json, print_lines, print_table
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.recipes.lock_file import Lock


def lock(
    recipes: Annotated[list[Path], typer.Argument(help="The recipes.")],
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing, and exit with code 6 if a lock is stale."),
    ] = False,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Pin the newest version of every expert.")
    ] = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Pin the base and the experts of recipes in lock files.

    RECIPE.lock.yaml states the digest and the source of everything that the recipe names. Experts
    that are pinned already keep their versions as long as the recipe allows it.

    Examples: hub lock recipe.yaml; hub lock --check *.yaml; hub lock recipe.yaml --upgrade
    """
    from experthub.hub.recipes.lock import check_lock

    if check:
        with open_session(registry) as session:
            locks = {path: check_lock(path, session) for path in recipes}
    else:
        locks = _write(recipes, None if upgrade else (), registry)
    _print(locks, json)


def update(
    name: Annotated[
        str, typer.Argument(help="The expert.", autocompletion=_completion.list_experts)
    ],
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The recipes; by default all in this folder whose locks pin the expert."
        ),
    ] = None,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Move an expert to its newest version in lock files.

    Examples: hub update sentiment; hub update sentiment recipe.yaml
    """
    from experthub.hub.recipes.lock import find_recipes_with
    from experthub.hub.registry.entries import check_name
    from experthub.hub.registry.expert import Reference

    name = check_name(Reference.parse(name).name)
    _print(_write(recipes or find_recipes_with(name, Path()), [name], registry), json)


def _write(
    recipes: list[Path], newest: Sequence[str] | None, registry: Path | None
) -> dict[Path, Lock]:
    """Lock recipes with the newest versions of some experts, or of all if None; write all or none."""
    from experthub.hub.recipes.lock import lock
    from experthub.hub.recipes.lock_file import lock_path

    with open_session(registry) as session:
        locks = {path: lock(path, session, update=newest) for path in recipes}
    for path, made in locks.items():
        made.write(lock_path(path))
    return locks


def _print(locks: dict[Path, Lock], json: bool) -> None:
    """Print the locks and what they pin."""
    from experthub.hub.recipes.lock_file import lock_path

    if json:
        rows = [
            {"recipe": str(path), "path": str(lock_path(path))} | made.record()
            for path, made in locks.items()
        ]
        print_json({"locks": rows})
        return
    for path, made in locks.items():
        print_lines([f"{lock_path(path)}  {made.composition}"])
        print_table(
            ["pinned", "digest", "source"],
            [[m.expert, m.digest[:19], m.sources[0]] for m in made.members],
        )


def register(app: typer.Typer) -> None:
    """Add the commands `lock` and `update` to the application."""
    app.command()(lock)
    app.command()(update)
