"""coefficients: what a learned merge found, by expert and block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from experthub.hub.formats.coefficients import CoefficientsRecord
    from experthub.merge import Coefficients


def coefficients(
    recipe: Annotated[Path, typer.Argument(help="A recipe whose merge learns coefficients.")],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write a heat map, experts by blocks, as PNG.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Register them, for coefficients: NAME.")
    ] = None,
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Print the coefficients of a learned merge; they are learned now unless they were before.

    Examples: hub coefficients recipe.yaml; hub coefficients recipe.yaml --plot coefficients.png;
    hub coefficients recipe.yaml --name my-coefficients
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
        if plan.routed or not plan.keeps_state:
            raise UsageError(
                f"{plan.recipe.methods[0].method} has no coefficients",
                "see hub methods for those that do",
            )
        content = plan.found or store_state(plan, session)
    record, found = load_state(plan, content, session)
    if name is not None:
        say(f"registered {register_found(content, name, session).reference}")
    if plot is not None:
        from experthub.hub.evaluation.plots import plot_coefficients

        labels = [expert.expert for expert in record.experts]
        values = found.values.mean(2) if found.values.ndim == 3 else found.values
        plot_coefficients(values.tolist(), labels, record.blocks, recipe.stem, plot)
        say(f"wrote {plot}")
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
    steps = len(record.history)
    print_fields(
        {
            "method": record.method + (f" ({record.objective})" if record.objective else ""),
            "granularity": f"{record.granularity}, {len(record.blocks)} blocks",
            "loss": f"{record.history[0]:.4f} at first, {record.history[-1]:.4f} after {steps} steps"
            if steps
            else "unknown",
            "digest": digest,
        }
    )
    rows = []
    for expert, values in zip(record.experts, found.values.flatten(1), strict=True):
        spread = [values.mean(), values.min(), values.median(), values.max()]
        rows.append([expert.expert, *(f"{float(value):+.3f}" for value in spread)])
    print_table(["expert", ">mean", ">least", ">median", ">most"], rows)


def register(app: typer.Typer) -> None:
    app.command()(coefficients)
