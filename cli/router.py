"""`hub router`: show the state of a recipe's router."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from experthub.cli._output import (
    DeviceOption,
    FrozenOption,
    JsonOption,
    LockedOption,
    RegistryOption,
    choose_pins,
    print_fields,
    print_json,
    print_table,
    say,
)
from experthub.cli._session import open_session


def router(
    recipe: Annotated[Path, typer.Argument(help="A recipe whose router has a state.")],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Register it, so that recipes can set router: NAME."),
    ] = None,
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Show the state of a recipe's router.

    The state is what the router needs besides the experts, such as an index of examples, mean
    activations or a trained classifier. If no earlier run has made it, it is made now and kept.

    Examples: hub router retrieval.yaml; hub router retrieval.yaml --name examples
    """
    from experthub.hub.errors import UsageError
    from experthub.hub.recipes.lock import plan_of
    from experthub.hub.registry.entries import check_name
    from experthub.hub.states.states import load_state, store_state
    from experthub.hub.transfer.describe import register_state

    if name is not None:
        check_name(name)
    with open_session(registry, device) as session:
        plan = plan_of(recipe, choose_pins(locked, frozen), session=session)
        if not plan.routed or not plan.keeps_state:
            raise UsageError(
                f"{plan.recipe.methods[0].method} has no state: it needs only its experts",
                "use a router with a state; docs/recipes.md lists them",
            )
        content = plan.found or store_state(plan, session)
    record, state = load_state(plan, content, session)
    if name is not None:
        say(f"registered {register_state(content, name, session).reference}")
    shapes = {tensor: list(values.shape) for tensor, values in sorted(state.tensors.items())}
    if json:
        described = record.model_dump(mode="json", by_alias=True)
        print_json({**described, "tensors": shapes, "digest": content.digest})
        return
    print_fields(
        {
            "method": record.method,
            "experts": ", ".join(expert.expert for expert in record.experts),
            "embedder": record.embedder or "",
            "data": record.data or "",
            "digest": content.digest,
        }
    )
    print_table(["tensor", "shape"], [[tensor, str(shape)] for tensor, shape in shapes.items()])


def register(app: typer.Typer) -> None:
    """Add the command `router` to the application."""
    app.command()(router)
