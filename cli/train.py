"""train: experts and their gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from experthub.cli import _completion
from experthub.cli._output import (
    DeviceOption,
    JsonOption,
    RegistryOption,
    print_json,
    print_lines,
    progress,
    say,
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train experts and gates.")

BaseOption = Annotated[
    str,
    typer.Option(help="The base: a name, a folder, hf:org/name.", autocompletion=_completion.bases),
]
TaskOption = Annotated[
    str, typer.Option(help="The task: suite:name or a folder.", autocompletion=_completion.tasks)
]
NameOption = Annotated[str, typer.Option("--name", help="What to call the expert.")]
StepsOption = Annotated[int, typer.Option(help="Optimiser steps.", min=1)]
ExamplesOption = Annotated[int, typer.Option(help="Training examples, at most.", min=1)]
BatchOption = Annotated[int, typer.Option(help="Examples per step.", min=1)]
RateOption = Annotated[float, typer.Option(help="Peak learning rate.", min=0.0)]
SeedOption = Annotated[int, typer.Option(help="Of initialisation and order.")]


@app.command()
def lora(
    base: BaseOption,
    task: TaskOption,
    name: NameOption,
    rank: Annotated[int, typer.Option(help="Rank of every LoRA.", min=1)] = 4,
    alpha: Annotated[
        float | None, typer.Option(help="LoRA's alpha; twice the rank by default.")
    ] = None,
    steps: StepsOption = 100,
    examples: ExamplesOption = 480,
    batch_size: BatchOption = 8,
    lr: RateOption = 2e-3,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Train a LoRA expert on a task's training split; an interrupted run goes on.

    Examples: hub train lora --base smollm2-135m-instruct --task bigbench:intent_recognition --name intents
    """
    from experthub.hub._memory import reuse_memory
    from experthub.hub.registry import Registry
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.train import train_lora

    reuse_memory()
    settings = Settings(steps, examples, batch_size, lr, seed)
    with progress() as report:
        expert = train_lora(
            base,
            task,
            name,
            settings,
            rank=rank,
            alpha=alpha,
            device=device,
            registry=Registry.read(registry),
            report=report,
        )
    _print(expert.reference, expert.digest, expert.training, json)


@app.command()
def full(
    base: BaseOption,
    task: TaskOption,
    name: NameOption,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Train the embeddings too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder for the fine-tuned model itself.")
    ] = None,
    steps: StepsOption = 100,
    examples: ExamplesOption = 480,
    batch_size: BatchOption = 8,
    lr: RateOption = 5e-5,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Fine-tune all of a base on a task; what changed is stored as a task vector.

    Examples: hub train full --base all-minilm-l6-v2 --task bigbench:intent_recognition --name intents-full;
    hub train full --base ./base --task mine:letters --name letters --out ./tuned
    """
    from experthub.cli.difference import print_difference
    from experthub.hub._memory import reuse_memory
    from experthub.hub.registry import Registry
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.full import train_full

    reuse_memory()
    settings = Settings(steps, examples, batch_size, lr, seed)
    with progress() as report:
        made = train_full(
            base,
            task,
            name,
            settings,
            embeddings=embeddings,
            out=out,
            device=device,
            registry=Registry.read(registry),
            report=report,
        )
    if not json:
        say(f"loss {made.expert.training['loss']}")
    print_difference(made, json)


@app.command()
def gate(
    name: Annotated[
        str,
        typer.Argument(
            help="A stored expert that says its task.", autocompletion=_completion.experts
        ),
    ],
    steps: StepsOption = 30,
    examples: ExamplesOption = 480,
    batch_size: BatchOption = 8,
    lr: RateOption = 5e-3,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Train an expert's PHATGOOSE gates; the result is its next version.

    Examples: hub train gate intents; hub train gate intents@1 --steps 100
    """
    from experthub.hub._memory import reuse_memory
    from experthub.hub.registry import Registry
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.train import train_gate

    reuse_memory()
    settings = Settings(steps, examples, batch_size, lr, seed)
    with progress() as report:
        expert = train_gate(
            name, settings, device=device, registry=Registry.read(registry), report=report
        )
    _print(expert.reference, expert.digest, expert.training["gate"], json)


def _print(reference: str, digest: str, training: dict[str, object], json: bool) -> None:
    if json:
        print_json({"expert": {"reference": reference, "digest": digest, "training": training}})
        return
    say(f"loss {training['loss']}")
    print_lines([f"{reference}  {digest}"])
