"""`hub diff`: store the difference between a fine-tuned model and its base as an expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from experthub.cli import _completion
from experthub.cli._options import JsonOption, RegistryOption
from experthub.cli._output import print_fields, print_json, print_lines
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.finetunes.difference import Difference

TaskOption = Annotated[
    str | None,
    typer.Option(
        help="The task of the fine-tuning: suite:name.", autocompletion=_completion.list_tasks
    ),
]


def diff(
    base: Annotated[
        str,
        typer.Argument(
            help="The base: a name, a folder or hf:org/name.", autocompletion=_completion.list_bases
        ),
    ],
    finetuned: Annotated[
        str, typer.Argument(help="The fine-tuned model: a name, a folder or hf:org/name.")
    ],
    name: Annotated[str, typer.Option("--name", help="The name of the new expert.")],
    rank: Annotated[
        int | None, typer.Option(help="Store a LoRA of this rank. It covers linear modules only.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Store a LoRA that keeps this share of the squared singular values of each module."
        ),
    ] = None,
    sparse: Annotated[
        float | None,
        typer.Option(help="Keep only the largest entries of each tensor: this share of them."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="The dtype: float32, bfloat16 or float16.")
    ] = "float32",
    max_shard_size: Annotated[
        str,
        typer.Option(metavar="SIZE", help="The largest size of one file of a task vector."),
    ] = "5GB",
    task: TaskOption = None,
    description: Annotated[str, typer.Option(help="A description in one line.")] = "",
    version: Annotated[
        int | None, typer.Option(help="The version; the next one by default.", min=1)
    ] = None,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Store fine-tuned minus base as an expert.

    The difference is a dense task vector, unless --rank, --energy or --sparse requests a smaller
    form. The output states the error of the stored difference.

    Examples: hub diff smollm2-135m-instruct ./tuned --name mine; hub diff ./base ./tuned --name mine --rank 16;
    hub diff ./base hf:someone/tuned --name theirs --sparse 0.1 --dtype bfloat16
    """
    from experthub.hub.finetunes.difference import diff as subtract
    from experthub.hub.transfer.remotes._limits import parse_size

    with open_session(registry) as session:
        made = subtract(
            base,
            finetuned,
            name,
            rank=rank,
            energy=energy,
            sparse=sparse,
            dtype=dtype,
            max_shard_size=parse_size(max_shard_size),
            task=task,
            description=description,
            version=version,
            session=session,
        )
    print_difference(made, json)


def print_difference(made: Difference, json: bool) -> None:
    """Print an expert that was made of a difference, and its errors.

    Args:
        made: The expert and its figures.
        json: Print JSON instead of text.
    """
    expert, figures = made.expert, made.figures
    if json:
        entry = {
            "reference": expert.reference,
            "digest": expert.digest,
            "kind": expert.kind,
            "training": expert.training,
        }
        print_json({"expert": entry, "difference": figures | {"left_out": list(made.left_out)}})
        return
    left_out, worst = figures.get("left_out"), figures.get("worst")
    share = figures["bytes"] / figures["dense_bytes"]
    ranks = figures.get("ranks")
    print_lines([f"{expert.reference}  {expert.digest}"])
    print_fields(
        {
            "kind": expert.kind,
            "bytes": f"{figures['bytes']}, {share:.3f} of dense float32 ({figures['dense_bytes']})",
            "parameters": f"{figures['changed']} changed, {figures['unchanged']} unchanged",
            "ranks": f"{ranks['min']}..{ranks['max']}, mean {ranks['mean']}" if ranks else "",
            "relative error": f"{figures['relative_error']:.4g}",
            "worst parameter": f"{worst['parameter']} ({worst['relative_error']:.4g})"
            if worst
            else "",
            "left out": f"{_join(made.left_out)}; {left_out['share_of_squared_error']:.4g} "
            "of the squared error"
            if left_out
            else "",
            "largest deviation": f"{figures['largest_deviation']:.4g} of base + expert "
            "from the fine-tuned model",
        }
    )


def _join(names: tuple[str, ...]) -> str:
    """Join the first three names, and count the others."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def register(app: typer.Typer) -> None:
    """Add the command `diff` to the application."""
    app.command()(diff)
