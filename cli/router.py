"""`hub router`: show the state of a recipe's router."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from experthub.cli._options import (
    DeviceOption,
    FrozenOption,
    JsonOption,
    LockedOption,
    RegistryOption,
)
from experthub.cli._output import choose_pins, print_fields, print_json, print_table
from experthub.cli._states import find_state


def router(
    recipe: Annotated[Path, typer.Argument(help="A recipe whose router has a state.")],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="Register the state under this name, so that recipes can set router: NAME.",
        ),
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
    pins = choose_pins(locked, frozen)
    content, record, state = find_state(recipe, name, pins, device, registry, routed=True)
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
