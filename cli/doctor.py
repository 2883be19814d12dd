"""doctor: what is here, what is missing, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from experthub.cli._output import JsonOption, RegistryOption, print_json, print_lines


def doctor(
    devices: Annotated[
        bool, typer.Option("--devices", help="Ask torch for devices; it takes seconds to import.")
    ] = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Check the environment, and say what is missing; ends with 1 if something is a problem.

    Examples: hub doctor; hub doctor --devices; hub doctor --json
    """
    from experthub.hub.doctor import examine

    checks = examine(registry, devices)
    if json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            print_lines([f"{check.status:<8} {check.name:<10}  {check.found}"])
            print_lines([f"{'':<8} {'next':>10}  {check.next}"] if check.next else [])
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    app.command()(doctor)
