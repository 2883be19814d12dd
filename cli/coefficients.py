"""`hub coefficients`: show the coefficients of a learned merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from experthub.cli._options import (
    DeviceOption,
    FrozenOption,
    JsonOption,
    LockedOption,
    RegistryOption,
)
from experthub.cli._output import choose_pins, print_fields, print_json, print_message, print_table
from experthub.cli._states import find_state

if TYPE_CHECKING:
    from experthub.hub.formats.coefficients import CoefficientsRecord
    from experthub.merge import Coefficients


def coefficients(
    recipe: Annotated[Path, typer.Argument(help="A recipe whose merge learns coefficients.")],
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw a heat map of experts by blocks in this PNG file."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="Register the coefficients under this name, so that recipes can set "
            "coefficients: NAME.",
        ),
    ] = None,
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Show the coefficients of a learned merge.

    If no earlier run has learned them, they are learned now and kept.

    Examples: hub coefficients recipe.yaml; hub coefficients recipe.yaml --plot coefficients.png;
    hub coefficients recipe.yaml --name my-coefficients
    """
    from experthub.hub.files.path_checks import check_file

    if plot is not None:
        check_file(plot)
    pins = choose_pins(locked, frozen)
    content, record, found = find_state(recipe, name, pins, device, registry, routed=False)
    if plot is not None:
        from experthub.hub.evaluation.plots import plot_coefficients

        labels = [expert.expert for expert in record.experts]
        values = found.values.mean(2) if found.values.ndim == 3 else found.values
        plot_coefficients(values.tolist(), labels, record.blocks, recipe.stem, plot)
        print_message(f"wrote {plot}")
    if json:
        print_json(
            {
                **record.model_dump(mode="json", by_alias=True),
                "coefficients": found.values.tolist(),
                "digest": content.digest,
            }
        )
    else:
        _print(record, found, content.digest)


def _print(record: CoefficientsRecord, found: Coefficients, digest: str) -> None:
    """Print the fields of the record, and a summary of the coefficients of each expert."""
    steps = len(record.history)
    print_fields(
        {
            "method": record.method + (f" ({record.objective})" if record.objective else ""),
            "granularity": f"{record.granularity}, {len(record.blocks)} blocks",
            "loss": f"{record.history[0]:.4f} in the first step, {record.history[-1]:.4f} after {steps} steps"
            if steps
            else "unknown",
            "digest": digest,
        }
    )
    rows = []
    for expert, values in zip(record.experts, found.values.flatten(1), strict=True):
        spread = [values.mean(), values.min(), values.median(), values.max()]
        rows.append([expert.expert, *(f"{float(value):+.3f}" for value in spread)])
    print_table(["expert", ">mean", ">min", ">median", ">max"], rows)


def register(app: typer.Typer) -> None:
    """Add the command `coefficients` to the application."""
    app.command()(coefficients)
