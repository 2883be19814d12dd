"""list, search, show, add, pull, push: what the hub holds."""

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
    progress,
)

if TYPE_CHECKING:
    from experthub.hub.expert import Expert


def list_(
    bases: Annotated[bool, typer.Option("--bases", help="List the base models.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    registry: RegistryOption = None,
) -> None:
    """List the experts that the registries know.

    Examples: hub list; hub list --bases; hub list --json | jq '.experts[].name'
    """
    from experthub.hub.registry import Registry

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
    from experthub.hub._yaml import did_you_mean
    from experthub.hub.errors import NotFoundError
    from experthub.hub.registry import Registry

    known = Registry.read(registry)
    found = known.search(words)
    if json:
        print_json({"experts": [_record(e) for e in found]})
    elif not found:
        everything = {word for e in known.experts() for word in [e.name, *e.tags]}
        raise NotFoundError(
            f"no expert has {' and '.join(map(repr, words))}",
            did_you_mean(words[0], everything) if len(words) == 1 else "try fewer words",
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
    from experthub.hub.store import Store

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
    from experthub.hub.expert import Reference
    from experthub.hub.registry import Registry

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
    from experthub.hub.describe import add_folder
    from experthub.hub.registry import Registry, checked_name
    from experthub.hub.store import Store

    expert = add_folder(
        folder,
        checked_name(name),
        Registry.read(),
        Store(),
        version=version,
        base=base,
        task=task,
        description=description,
        file=registry,
    )
    print_json({"expert": _record(expert)}) if json else print_lines([expert.reference])


def pull(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Experts or bases; hf:org/name[@revision].", autocompletion=_completion.experts
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="What to call an expert from a model hub.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size", metavar="SIZE", help="Fetch nothing larger: 500MB, 2GiB, or bytes."
        ),
    ] = None,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Bring experts or bases here, verified.

    Examples: hub pull sentiment; hub pull smollm2-135m-instruct sentiment intent-recognition@1;
    hub pull hf:someone/boolq-lora@main --name boolq --max-size 500MB
    """
    from experthub.hub.pull import pull_by_name
    from experthub.hub.registry import Registry
    from experthub.hub.remotes._http import at_most, parse_size
    from experthub.hub.store import Store

    known = Registry.read(registry)
    pulled: list[dict[str, str]] = []
    if name and len(names) > 1:
        from experthub.hub.errors import UsageError

        raise UsageError("--name is for one expert", "pull them one by one")
    with progress() as report, at_most(parse_size(max_size) if max_size else None):
        for wanted in names:
            if wanted in known.bases():
                from experthub.hub.base_sources import find

                base = find(wanted, known, report)
                pulled.append({"name": wanted, "digest": base.fingerprint})
            else:
                expert = pull_by_name(wanted, known, Store(), report, as_name=name)
                pulled.append({"name": expert.reference, "digest": expert.digest})
    if json:
        print_json({"pulled": pulled})
    else:
        print_lines([f"{p['name']}  {p['digest']}" for p in pulled])


def push(
    name: Annotated[str, typer.Argument(help="An expert.", autocompletion=_completion.experts)],
    target: Annotated[str, typer.Argument(help="Where to: hf:org/name[@branch].")],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, only for you.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    tag: Annotated[str | None, typer.Option(help="A tag for the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be sent.")
    ] = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Publish an expert, as it is stored, with a card, in one commit.

    Examples: hub push intents hf:me/intents --dry-run; hub push intents@2 hf:me/intents --tag v2
    """
    from experthub.hub.expert import Reference
    from experthub.hub.pull import Content
    from experthub.hub.pull import pull as pulled
    from experthub.hub.push import push as pushed
    from experthub.hub.registry import Registry
    from experthub.hub.store import Store

    known, store = Registry.read(registry), Store()
    expert = known.expert(Reference.parse(name))
    with progress() as report:
        pulled(Content.of(expert), store, report)
        done = pushed(
            expert,
            target,
            known,
            store,
            private=private,
            message=message,
            tag=tag,
            dry_run=dry_run,
            report=report,
        )
    if json:
        print_json({"pushed": vars(done) | {"expert": expert.reference, "digest": expert.digest}})
        return
    print_table(["file", ">bytes"], [[file, str(size)] for file, size in done.files.items()])
    print_lines([f"{target}@{done.commit}" if done.commit else "nothing was sent"])


def register(app: typer.Typer) -> None:
    app.command("list")(list_)
    app.command()(search)
    app.command()(show)
    app.command()(add)
    app.command()(pull)
    app.command()(push)
