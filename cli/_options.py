"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from experthub.cli import _completion

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only names, one per line.")]
RegistryOption = Annotated[
    Path | None,
    typer.Option("--registry", metavar="FILE", help="Search this registry file before all others."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="The device of the model: cpu, cuda, cuda:1, mps, or auto (all of them and the disk).",
    ),
]
LockedOption = Annotated[
    bool,
    typer.Option(
        "--locked", help="Use the lock, and fail if the recipe or a registry has changed."
    ),
]
FrozenOption = Annotated[
    bool, typer.Option("--frozen", help="Use the lock without reading any registry.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
TaskOption = Annotated[
    str,
    typer.Option(help="The task: suite:name, or a folder.", autocompletion=_completion.list_tasks),
]
LongOption = Annotated[
    str,
    typer.Option(
        "--long",
        help="Texts with more tokens than the base can read: cut them with a note, or refuse.",
        autocompletion=_completion.list_rules_for_long_texts,
    ),
]
TASKS_HELP = (
    "Tasks: suite:name, a folder, or @FILE with one task per line. "
    "Repeat the option, or separate tasks by commas or spaces."
)
