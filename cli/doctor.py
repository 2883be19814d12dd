"""`hub doctor`: check the environment."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from experthub.cli._options import JsonOption, RegistryOption
from experthub.cli._output import print_json, print_lines


def doctor(
    devices: Annotated[
        bool,
        typer.Option("--devices", help="List the devices of torch, which takes seconds to import."),
    ] = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Check the environment, and report what is missing.

    A warning means that some commands do not work here or have to fetch something first. The
    command exits with code 1 if there is a problem.

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
    """Add the command `doctor` to the application."""
    app.command()(doctor)
