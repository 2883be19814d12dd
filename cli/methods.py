"""`hub methods`: list the merges and routers that a recipe can name."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from experthub.cli import _completion
from experthub.cli._options import JsonOption, QuietOption
from experthub.cli._output import print_json, print_lines, print_table

if TYPE_CHECKING:
    from experthub.merge import Strategy


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A method to describe, with its options.", autocompletion=_completion.list_methods
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the merges and routers, or describe one of them.

    Examples: hub methods; hub methods phatgoose; hub methods --json
    """
    from experthub.hub.errors import NotFoundError
    from experthub.hub.files.spelling import suggest_name
    from experthub.merge import merges
    from experthub.routing import routers

    known: list[Strategy[Any]] = [*merges.values(), *routers.values()]
    chosen = [s for s in known if name in (None, s.name)]
    if not chosen:
        raise NotFoundError(
            f"unknown method {name!r}",
            suggest_name(str(name), [s.name for s in known]) or "run hub methods",
        )
    if json:
        print_json({"methods": [make_record(s) for s in chosen]})
    elif quiet:
        print_lines([s.name for s in chosen])
    elif name is None:
        print_table(
            ["method", "kind", "options", "description"],
            [[s.name, s.kind, ", ".join(s.options), s.summary] for s in chosen],
        )
    else:
        for strategy in chosen:
            print_lines(
                [
                    f"{strategy.name} ({strategy.kind})",
                    "",
                    strategy.summary,
                    "",
                    f"paper: {strategy.paper}",
                    *([f"needs: {', '.join(strategy.needs)}"] if strategy.needs else []),
                    *([f"routing: {strategy.traits.routing}"] if strategy.kind == "route" else []),
                ]
            )
            if strategy.options:
                print_table(
                    ["option", "type", "default", "meaning"],
                    [
                        [
                            o.name,
                            o.type_name,
                            "required" if o.required else str(o.default),
                            o.description,
                        ]
                        for o in strategy.options.values()
                    ],
                )


def make_record(strategy: Strategy[Any]) -> dict[str, Any]:
    """Return a method as plain values.

    Args:
        strategy: The method.

    Returns:
        Its entry in `hub methods --json`.
    """
    return {
        "name": strategy.name,
        "kind": strategy.kind,
        "paper": strategy.paper,
        "options": {
            o.name: {
                "type": o.type_name,
                "default": o.default,
                "required": o.required,
                "range": str(o.range) if o.range else None,
                "description": o.description,
            }
            for o in strategy.options.values()
        },
        "needs": list(strategy.needs),
        **({"routing": asdict(strategy.traits.routing)} if strategy.kind == "route" else {}),
    }


def register(app: typer.Typer) -> None:
    """Add the command `methods` to the application."""
    app.command()(methods)
