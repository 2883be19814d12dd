"""`hub convert`: turn an adapter that another program wrote into a folder that the hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from experthub.cli import _completion
from experthub.cli._options import JsonOption, RegistryOption
from experthub.cli._output import print_fields, print_json, print_lines
from experthub.cli._session import open_session


def convert(
    source: Annotated[Path, typer.Argument(help="The folder or the file of the adapter.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The base; by default the one that the adapter names.",
            autocompletion=_completion.list_bases,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Store a LoRA of this rank, by SVD. By default the change is exact."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="The dtype of computed tensors: float32, bfloat16 or float16.")
    ] = "float32",
    subfolder: Annotated[
        str, typer.Option(help="The sub-folder of the adapter, if there are several.")
    ] = "",
    adapter: Annotated[
        str | None, typer.Option(help="The name of the adapter, if one file holds several.")
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(help="The adapter as it was before its training, for PiSSA and similar."),
    ] = None,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Convert an adapter of peft or another program.

    The other programs are mlx-lm, kohya, diffusers and llama.cpp. A change of low rank becomes a
    LoRA, and any other change a task vector. The output states the error. A pickle (.bin, .pt) is
    read in a process without network that can write nowhere else.

    Examples: hub convert ./my-dora ./mine --base smollm2-135m-instruct; hub convert ./mlx-adapters ./mine;
    hub convert ./old/adapter_model.bin ./mine; hub convert ./my-oft ./mine --rank 16 --json
    """
    from experthub.hub.conversion.convert import convert as convert_adapter

    with open_session(registry) as session:
        made = convert_adapter(
            source,
            out,
            base=base,
            rank=rank,
            dtype=dtype,
            subfolder=subfolder,
            adapter=adapter,
            initial=initial,
            session=session,
        )
    if json:
        record = {"folder": str(made.folder), "kind": made.kind, **made.made_from}
        print_json({"converted": record | {"notes": made.notes}})
        return
    print_lines([str(made.folder)])
    ranks = made.made_from.get("ranks")
    print_fields(
        {
            "made from": f"{made.made_from['type']}, {made.made_from['format']}",
            "kind": made.kind,
            "ranks": "..".join(map(str, sorted({ranks["min"], ranks["max"]}))) if ranks else "",
            "relative error": f"{made.made_from['relative_error']:.4g}",
            "notes": "; ".join(made.notes),
            "next": f"hub add {made.folder} --name NAME",
        }
    )


def register(app: typer.Typer) -> None:
    """Add the command `convert` to the application."""
    app.command()(convert)
