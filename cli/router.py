"""router: what a router is made of, besides the experts."""

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
    pins_of,
    print_fields,
    print_json,
    print_table,
    say,
)
from experthub.cli._session import open_session


def router(
    recipe: Annotated[Path, typer.Argument(help="A recipe whose router needs more than experts.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Register it, for router: NAME.")
    ] = None,
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Print what a recipe's router is made of; it is made now unless it was before.

    An index of examples, mean activations, a trained classifier: whatever the method needs.

    Examples: hub router retrieval.yaml; hub router retrieval.yaml --name examples
    """
    from experthub.hub.errors import UsageError
    from experthub.hub.recipes.lock import plan_of
    from experthub.hub.registry.entries import check_name
    from experthub.hub.states.states import load_state, store_state
    from experthub.hub.transfer.describe import register_found

    if name is not None:
        check_name(name)
    with open_session(registry, device) as session:
        plan = plan_of(recipe, pins_of(locked, frozen), session=session)
        if not plan.routed or not plan.keeps_state:
            raise UsageError(
                f"{plan.recipe.methods[0].method} needs nothing besides its experts",
                "see hub methods for routers that do",
            )
        content = plan.found or store_state(plan, session)
    record, state = load_state(plan, content, session)
    if name is not None:
        say(f"registered {register_found(content, name, session).reference}")
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
    app.command()(router)
