"""train: experts and their gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from experthub.cli import _completion
from experthub.cli._arguments import read_task_references
from experthub.cli._output import (
    DeviceOption,
    JsonOption,
    RegistryOption,
    print_json,
    print_lines,
    say,
)
from experthub.cli._session import open_session

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train experts and gates.")

BaseOption = Annotated[
    str,
    typer.Option(help="The base: a name, a folder, hf:org/name.", autocompletion=_completion.list_bases),
]
TaskOption = Annotated[
    str, typer.Option(help="The task: suite:name or a folder.", autocompletion=_completion.list_tasks)
]
NameOption = Annotated[str, typer.Option("--name", help="What to call the expert.")]
StepsOption = Annotated[int, typer.Option(help="Optimiser steps.", min=1)]
ExamplesOption = Annotated[int, typer.Option(help="Training examples, at most.", min=1)]
BatchOption = Annotated[int, typer.Option(help="Examples per step.", min=1)]
RateOption = Annotated[float, typer.Option(help="Peak learning rate.", min=0.0)]
RouterRateOption = Annotated[
    float | None,
    typer.Option(
        help="Peak learning rate of the router; by default ten times --lr, 0.1 for --tune z.",
        min=0.0,
    ),
]
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
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.train import train_lora

    reuse_memory()
    settings = Settings(steps, examples, batch_size, lr, seed)
    with open_session(registry, device) as session:
        expert = train_lora(base, task, name, settings, rank=rank, alpha=alpha, session=session)
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
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.full import train_full

    reuse_memory()
    settings = Settings(steps, examples, batch_size, lr, seed)
    with open_session(registry, device) as session:
        made = train_full(
            base, task, name, settings, embeddings=embeddings, out=out, session=session
        )
    if not json:
        say(f"loss {made.expert.training['loss']}")
    print_difference(made, json)


@app.command()
def gate(
    name: Annotated[
        str,
        typer.Argument(
            help="A stored expert that says its task.", autocompletion=_completion.list_experts
        ),
    ],
    steps: StepsOption = 30,
    examples: ExamplesOption = 480,
    batch_size: BatchOption = 8,
    lr: RateOption = 5e-3,
    start: Annotated[
        float,
        typer.Option(
            help="Weight of the expert before, between 0 and 1; the paper's is 0.5, 0.1 suits experts "
            "with hardly any loss."
        ),
    ] = 0.5,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Train an expert's PHATGOOSE gates; the result is its next version.

    Examples: hub train gate intents; hub train gate intents@1 --steps 100 --start 0.1
    """
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.train import train_gate

    reuse_memory()
    settings = Settings(steps, examples, batch_size, lr, seed)
    with open_session(registry, device) as session:
        expert = train_gate(name, settings, start=start, session=session)
    _print(expert.reference, expert.digest, expert.training["gate"], json)


@app.command()
def skills(
    base: BaseOption,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            help="A task, or @FILE with one a line; repeat it for more.",
            autocompletion=_completion.list_tasks,
        ),
    ],
    name: NameOption,
    router: Annotated[
        str, typer.Option(help="poly, mhr; shared: one skill; private: one for each task.")
    ] = "mhr",
    n_skills: Annotated[int, typer.Option("--skills", help="Skills of an inventory.", min=1)] = 8,
    heads: Annotated[int, typer.Option(help="Heads of mhr; must divide all widths.", min=1)] = 1,
    rank: Annotated[int, typer.Option(help="Rank of every skill.", min=1)] = 4,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha; the rank by default.")] = None,
    granularity: Annotated[
        str, typer.Option(help="What has a router of its own: linear, layer or model.")
    ] = "linear",
    relaxed: Annotated[
        bool, typer.Option("--relaxed/--sigmoid", help="Draw the gates in training.")
    ] = False,
    steps: StepsOption = 300,
    examples: ExamplesOption = 480,
    batch_size: BatchOption = 16,
    lr: RateOption = 2e-3,
    router_lr: RouterRateOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Train an inventory of skills on several tasks, with a router by task (Poly, MHR).

    Examples: hub train skills --base all-minilm-l6-v2 --tasks bigbench:ruin_names --tasks bigbench:intent_recognition --name inventory;
    hub train skills --base all-minilm-l6-v2 --tasks @tasks.txt --router mhr --skills 4 --heads 8 --name inventory
    """
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.inventory import shape_of
    from experthub.hub.training.skills import train_skills

    reuse_memory()
    shape = shape_of(router, n_skills, heads, rank, alpha, granularity, relaxed)
    settings = Settings(steps, examples, batch_size, lr, seed)
    with open_session(registry, device) as session:
        expert = train_skills(
            base,
            read_task_references(tasks),
            name,
            shape,
            settings,
            router_lr=router_lr,
            session=session,
        )
    _print(expert.reference, expert.digest, expert.training, json)


@app.command()
def adapt(
    skills: Annotated[
        str, typer.Argument(help="A stored inventory.", autocompletion=_completion.list_experts)
    ],
    task: TaskOption,
    name: NameOption,
    tune: Annotated[
        str, typer.Option(help="all; z: the router alone; mu: the average, as a plain LoRA.")
    ] = "all",
    shots: Annotated[int, typer.Option(help="Examples in all.", min=1)] = 16,
    steps: StepsOption = 100,
    batch_size: BatchOption = 8,
    lr: RateOption = 2e-3,
    router_lr: RouterRateOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Adapt an inventory of skills to a new task by a few examples (MHR, MHR-z, MHR-mu).

    Examples: hub train adapt inventory --task bigbench:emoji_movie --name emojis;
    hub train adapt inventory --task bigbench:emoji_movie --tune z --shots 64 --name emojis-z
    """
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.skills import adapt as adapted
    from experthub.hub.training.skills import tune_of

    reuse_memory()
    settings = Settings(steps, shots, min(batch_size, shots), lr, seed)
    with open_session(registry, device) as session:
        expert = adapted(
            skills,
            task,
            name,
            tune_of(tune),
            settings,
            shots=shots,
            router_lr=router_lr,
            session=session,
        )
    _print(expert.reference, expert.digest, expert.training, json)


def _print(reference: str, digest: str, training: dict[str, object], json: bool) -> None:
    if json:
        print_json({"expert": {"reference": reference, "digest": digest, "training": training}})
        return
    say(f"loss {training['loss']}")
    print_lines([f"{reference}  {digest}"])
