"""Options of the commands of `hub train`."""

from __future__ import annotations

from typing import Annotated

import typer
from experthub.cli import _completion
from experthub.cli._options import TASKS_HELP

BaseOption = Annotated[
    str,
    typer.Option(
        help="The base: a name, a folder or hf:org/name.", autocompletion=_completion.list_bases
    ),
]
NameOption = Annotated[str, typer.Option("--name", help="The name of the new expert.")]
StepsOption = Annotated[int, typer.Option(help="The number of optimiser steps.", min=1)]
ExamplesOption = Annotated[
    int, typer.Option(help="The largest number of training examples per task.", min=1)
]
BatchOption = Annotated[int, typer.Option(help="The number of examples per step.", min=1)]
RateOption = Annotated[float, typer.Option(help="The peak learning rate.", min=0.0)]
RouterRateOption = Annotated[
    float | None,
    typer.Option(
        help="The peak learning rate of the router; ten times --lr by default, and 0.1 for "
        "--tune z.",
        min=0.0,
    ),
]
SeedOption = Annotated[
    int, typer.Option(help="The seed of the initialisation and of the order of examples.")
]
TasksOption = Annotated[
    list[str],
    typer.Option(
        "--tasks",
        help=TASKS_HELP,
        autocompletion=_completion.list_tasks,
    ),
]
RouterOption = Annotated[
    str,
    typer.Option(
        help="The router: poly, mhr, shared (one skill) or private (one skill for each task)."
    ),
]
TargetsOption = Annotated[
    str,
    typer.Option(
        help="The layers that get a LoRA: all-linear, names with commas between them (q_proj,v_proj), "
        "or a regular expression that matches whole paths."
    ),
]
HeadsOption = Annotated[
    int,
    typer.Option(
        help="The number of heads of mhr; it must divide the widths of all modules.", min=1
    ),
]
GranularityOption = Annotated[
    str,
    typer.Option(
        help="The unit that has a router of its own: linear (each module), layer (each layer) or "
        "model."
    ),
]
RelaxedOption = Annotated[
    bool,
    typer.Option(
        "--relaxed/--sigmoid",
        help="Draw the gates at random in training; --sigmoid uses the logits' sigmoid.",
    ),
]
TuneOption = Annotated[
    str,
    typer.Option(
        help="The parameters to train: all, z (only the router), or mu (the average of the skills, "
        "which gives a plain LoRA)."
    ),
]
