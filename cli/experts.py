"""`hub list`, `search`, `show` and `add`: look up experts and bases, and add new experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from experthub.cli import _completion
from experthub.cli._options import JsonOption, QuietOption, RegistryOption
from experthub.cli._output import (
    print_fields,
    print_json,
    print_lines,
    print_message,
    print_table,
)
from experthub.cli._session import open_session
from experthub.cli.bases import flatten, print_base, print_bases

if TYPE_CHECKING:
    from experthub.hub.registry.expert import Expert


def list_(
    bases: Annotated[bool, typer.Option("--bases", help="List the bases instead.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    registry: RegistryOption = None,
) -> None:
    """List the experts that the registries know.

    The column "in store" marks the experts that can be used without a download.

    Examples: hub list; hub list --bases; hub list --json | jq '.experts[].name'
    """
    from experthub.hub.registry.registry import Registry

    known = Registry.read(registry)
    if bases:
        print_bases(known, json, quiet)
        return
    experts = known.list_experts()
    if json:
        print_json({"experts": [_make_record(e) for e in experts]})
    elif quiet:
        print_lines([e.reference for e in experts])
    else:
        _print_experts(experts)


def search(
    words: Annotated[list[str], typer.Argument(help="The words, all of which must occur.")],
    json: JsonOption = False,
    quiet: QuietOption = False,
    registry: RegistryOption = None,
) -> None:
    """Find experts by words.

    The words are searched in names, tags, tasks, kinds, bases and descriptions, whatever their
    case. The best match is listed first.

    Examples: hub search sentiment; hub search "multiple choice" commonsense; hub search minilm -q
    """
    from experthub.hub.errors import NotFoundError
    from experthub.hub.files.spelling import suggest_name
    from experthub.hub.registry.registry import Registry

    known = Registry.read(registry)
    found = known.search(words)
    if json:
        print_json({"experts": [_make_record(e) for e in found]})
    elif not found:
        everything = {word for e in known.list_experts() for word in [e.name, *e.tags]}
        raise NotFoundError(
            f"no expert matches {' and '.join(map(repr, words))}",
            (suggest_name(words[0], everything) or "run hub list")
            if len(words) == 1
            else "try fewer words",
        )
    elif quiet:
        print_lines([e.reference for e in found])
    else:
        _print_experts(found)


def _print_experts(experts: list[Expert]) -> None:
    """Print a table of experts."""
    rows = [
        [e.reference, e.kind, e.base, e.task or "", "yes" if _is_stored(e) else "", e.description]
        for e in experts
    ]
    print_table(["expert", "kind", "base", "trained on", "in store", "description"], rows)


def _is_stored(expert: Expert) -> bool:
    """Return whether the store holds the expert."""
    from experthub.hub.store.store import Store

    return expert.digest.removeprefix("sha256:") in Store()


def _make_record(expert: Expert) -> dict[str, Any]:
    """Return the entry of an expert as plain values, and whether the store holds it."""
    record: dict[str, Any] = expert.model_dump(mode="json")
    return record | {"in_store": _is_stored(expert)}


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="The expert or base: NAME, NAME@2 or NAME@sha256:...",
            autocompletion=_completion.list_experts,
        ),
    ],
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Show the registry entry of an expert or a base.

    Examples: hub show sentiment; hub show sentiment@1 --json; hub show smollm2-135m-instruct
    """
    from experthub.hub.registry.expert import Reference
    from experthub.hub.registry.registry import Registry

    known = Registry.read(registry)
    if name in known.list_bases():
        print_base(name, json, registry)
        if versions := [e.reference for e in known.list_experts() if e.name == name]:
            print_message(f"note: {name} is also an expert; run hub show {versions[-1]}")
        return
    expert = known.find_expert(Reference.parse(name))
    if json:
        print_json({"expert": _make_record(expert)})
        return
    record = _make_record(expert)
    scores = record.pop("scores")
    print_fields(flatten(record))
    if scores:
        print_table(
            ["score on", "split", ">n", ">base", ">expert"],
            [
                [s["task"], s["split"], str(s["n"]), f"{s['base']:.3f}", f"{s['expert']:.3f}"]
                for s in scores
            ],
        )


def add(
    folder: Annotated[
        Path,
        typer.Argument(help="The expert's folder, such as one that peft's save_pretrained wrote."),
    ],
    name: Annotated[str, typer.Option("--name", help="The name of the expert.")],
    version: Annotated[
        int | None, typer.Option(help="The version; the next one by default.", min=1)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base; by default the one that the folder names.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="The task that the expert was trained on: suite:name.",
            autocompletion=_completion.list_tasks,
        ),
    ] = None,
    description: Annotated[str | None, typer.Option(help="A description in one line.")] = None,
    subfolder: Annotated[
        str, typer.Option(help="The sub-folder of the adapter, if there are several.")
    ] = "",
    proof: Annotated[
        bool | None,
        typer.Option(
            "--proof/--no-proof",
            help="Compare the expert with peft; by default if the base is here and at most 2 GiB.",
        ),
    ] = None,
    json: JsonOption = False,
    registry: Annotated[
        Path | None,
        typer.Option("--registry", metavar="FILE", help="Write the entry to this registry file."),
    ] = None,
) -> None:
    """Copy the folder of an expert into the store under a name.

    All files are checked first. The entry is written to your own registry, or to --registry.
    Adapters of other types and programs are converted if that is exact; see hub convert. If the base
    is on this machine, the outputs of the composed expert are compared with those of peft. An expert
    that differs is refused.

    Examples: hub add ./my-lora --name my-lora; hub add ./my-lora --name my-lora --task bigbench:snarks;
    hub add ./run --subfolder checkpoint-500 --name mine
    """
    from experthub.hub.transfer.adding import add_expert

    with open_session() as session:
        expert = add_expert(
            folder,
            name,
            session,
            version=version,
            base=base,
            task=task,
            description=description,
            subfolder=subfolder,
            proof=proof,
            file=registry,
        )
    if json:
        print_json({"expert": _make_record(expert)})
    else:
        print_lines([expert.reference])
        if expert.proof:
            found = expert.proof
            print_message(
                f"equal to {found.against} within {found.max_difference:.1e} ({found.dtype})"
            )


def register(app: typer.Typer) -> None:
    """Add the commands `list`, `search`, `show` and `add` to the application."""
    app.command("list")(list_)
    app.command()(search)
    app.command()(show)
    app.command()(add)
