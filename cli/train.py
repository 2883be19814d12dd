"""`hub train`: train LoRAs, whole models, gates and inventories of skills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from experthub.cli import _completion
from experthub.cli._arguments import read_task_references
from experthub.cli._options import DeviceOption, JsonOption, RegistryOption, TaskOption
from experthub.cli._output import print_json, print_lines, print_message
from experthub.cli._session import open_session
from experthub.cli._train_options import (
    BaseOption,
    BatchOption,
    ExamplesOption,
    GranularityOption,
    HeadsOption,
    NameOption,
    RateOption,
    RelaxedOption,
    RouterOption,
    RouterRateOption,
    SeedOption,
    StepsOption,
    TargetsOption,
    TasksOption,
    TuneOption,
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train experts, their gates, and inventories of skills.",
)


@app.command()
def lora(
    base: BaseOption,
    task: TaskOption,
    name: NameOption,
    rank: Annotated[int, typer.Option(help="The rank of every LoRA.", min=1)] = 4,
    alpha: Annotated[
        float | None, typer.Option(help="LoRA's alpha; twice the rank by default.")
    ] = None,
    targets: TargetsOption = "all-linear",
    steps: StepsOption = 100,
    examples: ExamplesOption = 480,
    batch_size: BatchOption = 8,
    lr: RateOption = 2e-3,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Train a LoRA on the training split of a task.

    Every linear layer of the frozen base gets a LoRA, or those that --targets selects. An interrupted
    run continues if the same command is run again.

    Examples: hub train lora --base smollm2-135m-instruct --task bigbench:intent_recognition --name intents;
    hub train lora --base ./base --task mine:letters --name letters --targets q_proj,v_proj
    """
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.train import train_lora

    reuse_memory()
    settings = Settings(steps, examples, batch_size, lr, seed)
    with open_session(registry, device) as session:
        expert = train_lora(
            base, task, name, settings, rank=rank, alpha=alpha, targets=targets, session=session
        )
    _print(expert.reference, expert.digest, expert.training, json)


@app.command()
def full(
    base: BaseOption,
    task: TaskOption,
    name: NameOption,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Train the embeddings, too.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write the fine-tuned model to this new folder."),
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
    """Fine-tune all parameters of a base on a task.

    The change of the parameters is stored as a task vector. The embeddings stay frozen without
    --embeddings. An interrupted run continues if the same command is run again.

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
        print_message(_describe_loss(made.expert.training))
    print_difference(made, json)


@app.command()
def gate(
    name: Annotated[
        str,
        typer.Argument(
            help="An expert whose task is recorded.", autocompletion=_completion.list_experts
        ),
    ],
    steps: StepsOption = 30,
    examples: ExamplesOption = 480,
    batch_size: BatchOption = 8,
    lr: RateOption = 5e-3,
    start: Annotated[
        float,
        typer.Option(
            help="The expert's weight before training, between 0 and 1. The paper uses 0.5; use 0.1 "
            "if the loss is close to zero."
        ),
    ] = 0.5,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Train the gates of an expert for the router PHATGOOSE.

    The base and the expert are frozen. The expert with its gates becomes its next version.

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
    tasks: TasksOption,
    name: NameOption,
    router: RouterOption = "mhr",
    n_skills: Annotated[int, typer.Option("--skills", help="The number of skills.", min=1)] = 8,
    heads: HeadsOption = 1,
    rank: Annotated[int, typer.Option(help="The rank of every skill.", min=1)] = 4,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha; the rank by default.")] = None,
    granularity: GranularityOption = "linear",
    relaxed: RelaxedOption = False,
    steps: StepsOption = 300,
    examples: ExamplesOption = 480,
    batch_size: BatchOption = 16,
    lr: RateOption = 2e-3,
    router_lr: Annotated[
        float | None,
        typer.Option(
            help="The peak learning rate of the router; ten times --lr by default.", min=0.0
        ),
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Train an inventory of skills on several tasks.

    A router mixes the skills for each task, as in Poly and MHR. Every batch mixes tasks. An
    interrupted run continues if the same command is run again.

    Examples: hub train skills --base all-minilm-l6-v2 --tasks bigbench:ruin_names --tasks bigbench:intent_recognition --name inventory;
    hub train skills --base all-minilm-l6-v2 --tasks @tasks.txt --router mhr --skills 4 --heads 8 --name inventory
    """
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.inventory import parse_shape
    from experthub.hub.training.skills import train_skills

    reuse_memory()
    shape = parse_shape(router, n_skills, heads, rank, alpha, granularity, relaxed)
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
        str,
        typer.Argument(help="The inventory of skills.", autocompletion=_completion.list_experts),
    ],
    task: TaskOption,
    name: NameOption,
    tune: TuneOption = "all",
    shots: Annotated[int, typer.Option(help="The number of training examples.", min=1)] = 16,
    steps: StepsOption = 100,
    batch_size: BatchOption = 8,
    lr: RateOption = 2e-3,
    router_lr: RouterRateOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Adapt an inventory of skills to a new task.

    --tune all, z and mu correspond to MHR, MHR-z and MHR-mu of the paper. A few examples suffice.

    Examples: hub train adapt inventory --task bigbench:emoji_movie --name emojis;
    hub train adapt inventory --task bigbench:emoji_movie --tune z --shots 64 --name emojis-z
    """
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.training.adaptation import adapt as adapt_skills
    from experthub.hub.training.adaptation import parse_tune
    from experthub.hub.training.fit import Settings

    reuse_memory()
    settings = Settings(steps, shots, min(batch_size, shots), lr, seed)
    with open_session(registry, device) as session:
        expert = adapt_skills(
            skills,
            task,
            name,
            parse_tune(tune),
            settings,
            shots=shots,
            router_lr=router_lr,
            session=session,
        )
    _print(expert.reference, expert.digest, expert.training, json)


def _print(reference: str, digest: str, training: dict[str, object], json: bool) -> None:
    """Print a trained expert, and its first and last loss."""
    if json:
        print_json({"expert": {"reference": reference, "digest": digest, "training": training}})
        return
    print_message(_describe_loss(training))
    print_lines([f"{reference}  {digest}"])


def _describe_loss(training: Mapping[str, Any]) -> str:
    """Describe the mean losses of the first and of the last steps."""
    loss = training["loss"]
    return f"loss: {loss['first']} at the start, {loss['last']} at the end"
