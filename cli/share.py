"""pull, push, export, import: experts on their way from one hub to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from experthub.cli import _completion
from experthub.cli._output import (
    DryRunOption,
    JsonOption,
    RegistryOption,
    print_json,
    print_lines,
    print_table,
    say,
)
from experthub.cli._session import open_session


def pull(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Experts or bases; hf:org/name[@revision]; file:PLACE[#name@version].",
            autocompletion=_completion.list_experts,
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="What to call an expert that no registry knows.")
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
    hub pull hf:someone/boolq-lora@main --name boolq --max-size 500MB; hub pull file:/mnt/experts#intents@2
    """
    from experthub.hub.transfer.pull_by_name import pull_by_name
    from experthub.hub.transfer.remotes._http import at_most, parse_size

    pulled: list[dict[str, str]] = []
    if name and len(names) > 1:
        from experthub.hub.errors import UsageError

        raise UsageError("--name is for one expert", "pull them one by one")
    limit = parse_size(max_size) if max_size else None
    with open_session(registry) as session, at_most(limit):
        for wanted in names:
            if wanted in session.registry.bases():
                from experthub.hub.bases.base_sources import find

                base = find(wanted, session)
                pulled.append({"name": wanted, "digest": base.fingerprint})
            else:
                for expert in pull_by_name(wanted, session, as_name=name):
                    pulled.append({"name": expert.reference, "digest": expert.digest})
    if json:
        print_json({"pulled": pulled})
    else:
        print_lines([f"{p['name']}  {p['digest']}" for p in pulled])


def push(
    name: Annotated[str, typer.Argument(help="An expert.", autocompletion=_completion.list_experts)],
    target: Annotated[str, typer.Argument(help="Where to: hf:org/name[@branch], file:DIR.")],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, only for you.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    tag: Annotated[str | None, typer.Option(help="A tag for the commit.")] = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Publish an expert, as it is stored: in one commit of a repository, or in a shared folder.

    Examples: hub push intents hf:me/intents --dry-run; hub push intents@2 hf:me/intents --tag v2;
    hub push intents file:/mnt/experts
    """
    from experthub.hub.registry.content import Content
    from experthub.hub.registry.expert import Reference
    from experthub.hub.transfer.pull import pull as pulled
    from experthub.hub.transfer.push import push as pushed

    with open_session(registry) as session:
        expert = session.registry.expert(Reference.parse(name))
        pulled(session, Content.of(expert))
        done = pushed(
            expert,
            target,
            session,
            private=private,
            message=message,
            tag=tag,
            dry_run=dry_run,
        )
    if json:
        print_json({"pushed": vars(done) | {"expert": expert.reference, "digest": expert.digest}})
        return
    print_table(["file", ">bytes"], [[file, str(size)] for file, size in done.files.items()])
    print_lines([done.source or "nothing was sent"])


def export(
    names: Annotated[
        list[str], typer.Argument(help="Experts.", autocompletion=_completion.list_experts)
    ],
    target: Annotated[
        Path, typer.Argument(help="A new archive FILE.tar; with --portable, a new folder.")
    ],
    portable: Annotated[
        bool,
        typer.Option(
            "--portable", help="One LoRA that peft, vLLM, SGLang and llama.cpp read alike."
        ),
    ] = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Write experts to an archive for another hub, or one as a folder for other programs.

    Examples: hub export intents sentiment@2 experts.tar; hub export intents --portable ./intents
    """
    from experthub.hub.errors import UsageError
    from experthub.hub.registry.content import Content
    from experthub.hub.registry.expert import Reference
    from experthub.hub.transfer.pull import pull as pulled

    if portable and len(names) > 1:
        raise UsageError("--portable is for one expert", "write one folder for each")
    if not portable and target.suffix != ".tar":
        raise UsageError(f"{target} is no name of an archive", "write names first, FILE.tar last")
    with open_session(registry) as session:
        experts = [session.registry.expert(Reference.parse(name)) for name in names]
        pulled(session, *map(Content.of, experts))
    if portable:
        from experthub.hub.composition.export import export_portable

        export_portable(experts[0], target, session)
    else:
        from experthub.hub.transfer.oci_image import image, write_archive

        write_archive([image(expert, session.store) for expert in experts], target)
    if json:
        listed = [{"name": e.reference, "digest": e.digest} for e in experts]
        print_json({"exported": listed, "out": str(target)})
    else:
        print_lines([f"{e.reference}  {e.digest}" for e in experts])
        say(f"wrote {target}")


def import_(
    file: Annotated[Path, typer.Argument(help="An archive that hub export wrote.")],
    json: JsonOption = False,
) -> None:
    """Take the experts of an archive in, each file checked; nothing is unpacked by its own word.

    Examples: hub import experts.tar
    """
    from experthub.hub.errors import NotFoundError

    if not file.is_file():
        raise NotFoundError(f"there is no archive {file}", "name what hub export wrote")
    pull([f"file:{file}"], json=json)


def register(app: typer.Typer) -> None:
    app.command()(pull)
    app.command()(push)
    app.command()(export)
    app.command("import")(import_)
