"""list, search, show, add: what the hub holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from experthub.cli import _completion
from experthub.cli._output import (
    JsonOption,
    QuietOption,
    RegistryOption,
    print_fields,
    print_json,
    print_lines,
    print_table,
)

if TYPE_CHECKING:
    from experthub.hub.registry.expert import Expert


def list_(
    bases: Annotated[bool, typer.Option("--bases", help="List the base models.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    registry: RegistryOption = None,
) -> None:
    """List the experts that the registries know.

    Examples: hub list; hub list --bases; hub list --json | jq '.experts[].name'
    """
    from experthub.hub.registry.registry import Registry

    known = Registry.read(registry)
    if bases:
        entries = known.bases()
        if json:
            print_json(
                {"bases": [{"name": n} | e.model_dump(mode="json") for n, e in entries.items()]}
            )
        elif quiet:
            print_lines(list(entries))
        else:
            print_table(
                ["base", "licence", "source"],
                [[n, e.license or "", e.sources[0]] for n, e in entries.items()],
            )
        return
    experts = known.experts()
    if json:
        print_json({"experts": [_record(e) for e in experts]})
    elif quiet:
        print_lines([e.reference for e in experts])
    else:
        _print_experts(experts)


def search(
    words: Annotated[list[str], typer.Argument(help="Words; all of them must occur.")],
    json: JsonOption = False,
    quiet: QuietOption = False,
    registry: RegistryOption = None,
) -> None:
    """Find experts by words in their names, tags, tasks, bases and descriptions.

    Examples: hub search sentiment; hub search "multiple choice" commonsense; hub search minilm -q
    """
    from experthub.hub.errors import NotFoundError
    from experthub.hub.files.spelling import suggest_name
    from experthub.hub.registry.registry import Registry

    known = Registry.read(registry)
    found = known.search(words)
    if json:
        print_json({"experts": [_record(e) for e in found]})
    elif not found:
        everything = {word for e in known.experts() for word in [e.name, *e.tags]}
        raise NotFoundError(
            f"no expert has {' and '.join(map(repr, words))}",
            suggest_name(words[0], everything) if len(words) == 1 else "try fewer words",
        )
    elif quiet:
        print_lines([e.reference for e in found])
    else:
        _print_experts(found)


def _print_experts(experts: list[Expert]) -> None:
    rows = [
        [e.reference, e.kind, e.base, e.task or "", "yes" if _stored(e) else "", e.description]
        for e in experts
    ]
    print_table(["expert", "kind", "base", "trained on", "here", "description"], rows)


def _stored(expert: Any) -> bool:
    from experthub.hub.store.store import Store

    return expert.digest.removeprefix("sha256:") in Store()


def _record(expert: Any) -> dict[str, Any]:
    record: dict[str, Any] = expert.model_dump(mode="json")
    return record | {"in_store": _stored(expert)}


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="An expert or a base: NAME, NAME@2, NAME@sha256:...",
            autocompletion=_completion.experts,
        ),
    ],
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Show what is known of one expert or base.

    Examples: hub show sentiment; hub show sentiment@1 --json; hub show smollm2-135m-instruct
    """
    from experthub.hub.registry.expert import Reference
    from experthub.hub.registry.registry import Registry

    known = Registry.read(registry)
    if name in known.bases():
        entry = known.bases()[name]
        record = {"name": name} | entry.model_dump(mode="json")
        print_json({"base": record}) if json else print_fields(_flat(record))
        return
    expert = known.expert(Reference.parse(name))
    if json:
        print_json({"expert": _record(expert)})
        return
    record = _record(expert)
    scores = record.pop("scores")
    print_fields(_flat(record))
    if scores:
        print_table(
            ["score on", "split", ">n", ">base", ">expert"],
            [
                [s["task"], s["split"], str(s["n"]), f"{s['base']:.3f}", f"{s['expert']:.3f}"]
                for s in scores
            ],
        )


def _flat(record: dict[str, Any]) -> dict[str, str]:
    flat = {}
    for key, value in record.items():
        if isinstance(value, list):
            flat[key] = ", ".join(map(str, value))
        elif isinstance(value, dict):
            flat[key] = ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, dict))
        elif value is not None:
            flat[key] = (
                {True: "yes", False: "no"}.get(value, str(value))
                if isinstance(value, bool)
                else str(value)
            )
    return flat


def add(
    folder: Annotated[Path, typer.Argument(help="A folder that peft's save_pretrained wrote.")],
    name: Annotated[str, typer.Option("--name", help="What to call it.")],
    version: Annotated[
        int | None, typer.Option(help="Its version, the next one by default.", min=1)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Its base, by default what the folder says.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="What it was trained on: suite:name.", autocompletion=_completion.tasks),
    ] = None,
    description: Annotated[str | None, typer.Option(help="One line.")] = None,
    json: JsonOption = False,
    registry: Annotated[
        Path | None,
        typer.Option("--registry", metavar="FILE", help="Write the entry into this file."),
    ] = None,
) -> None:
    """Take an adapter into the store, checked, under a name.

    Examples: hub add ./my-lora --name my-lora; hub add ./my-lora --name my-lora --task bigbench:snarks
    """
    from experthub.hub.registry.entries import check_name
    from experthub.hub.session import Session
    from experthub.hub.transfer.describe import add_folder

    expert = add_folder(
        folder,
        check_name(name),
        Session(),
        version=version,
        base=base,
        task=task,
        description=description,
        file=registry,
    )
    print_json({"expert": _record(expert)}) if json else print_lines([expert.reference])


def register(app: typer.Typer) -> None:
    app.command("list")(list_)
    app.command()(search)
    app.command()(show)
    app.command()(add)
