"""`hub pull`, `push`, `export` and `import`: move experts from one hub to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from experthub.cli import _completion
from experthub.cli._options import DryRunOption, JsonOption, RegistryOption, YesOption
from experthub.cli._output import ask, print_json, print_lines, print_message, print_table
from experthub.cli._session import open_session
from experthub.hub.files.safe_text import escape

if TYPE_CHECKING:
    from experthub.hub.session import Session


def pull(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Experts or bases: a name, hf:org/name[@revision] or file:PLACE[#name@version].",
            autocompletion=_completion.list_experts,
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="The name for an expert that no registry knows.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size",
            metavar="SIZE",
            help="Refuse downloads above this size: 500MB, 2GiB or a number of bytes.",
        ),
    ] = None,
    yes: YesOption = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Fetch experts or bases, verify them, and store them.

    What is stored already is not fetched again. An interrupted download continues. If an expert
    calls itself by a name that belongs to an expert from another place, you are asked first.

    Examples: hub pull sentiment; hub pull smollm2-135m-instruct sentiment intent-recognition@1;
    hub pull hf:someone/boolq-lora@main --name boolq --max-size 500MB; hub pull file:/mnt/experts#intents@2
    """
    from experthub.hub.errors import UsageError
    from experthub.hub.registry.entries import NameConflictError
    from experthub.hub.transfer.remotes._limits import limit_download_size, parse_size

    pulled: list[dict[str, str]] = []
    if name and len(names) > 1:
        raise UsageError("--name is for one expert", "pull the experts one by one")
    limit = parse_size(max_size) if max_size else None
    accepted: set[str] = set()
    for wanted in names:
        while True:
            try:
                with open_session(registry) as session, limit_download_size(limit):
                    pulled += _pull_one(wanted, session, name, lambda r: yes or r in accepted)
                break
            except NameConflictError as error:  # The progress bars are closed here.
                if not ask(f"{escape(error.message)}: accept it?"):
                    raise
                accepted.add(error.reference)
    if json:
        print_json({"pulled": pulled})
    else:
        print_lines([f"{p['name']}  {p['digest']}" for p in pulled])


def _pull_one(
    wanted: str, session: Session, name: str | None, accept: Callable[[str], bool]
) -> list[dict[str, str]]:
    """Pull a base, or the experts that a reference refers to; list their names and digests."""
    from experthub.hub.errors import UsageError
    from experthub.hub.transfer.pull_by_name import pull_by_name

    if wanted not in session.registry.list_bases():
        experts = pull_by_name(wanted, session, as_name=name, accept=accept)
        return [{"name": expert.reference, "digest": expert.digest} for expert in experts]
    from experthub.hub.bases.base_sources import find

    if name:
        raise UsageError(f"{wanted} is a base, and --name is for experts", "remove --name")
    base = find(wanted, session)
    return [{"name": wanted, "digest": base.digest, "fingerprint": base.fingerprint}]


def push(
    name: Annotated[
        str, typer.Argument(help="The expert.", autocompletion=_completion.list_experts)
    ],
    target: Annotated[
        str, typer.Argument(help="The destination: hf:org/name[@branch] or file:DIR.")
    ],
    private: Annotated[
        bool,
        typer.Option("--private", help="Create the repository as private if it does not exist."),
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="The message of the commit.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="A tag for the commit.")] = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Publish an expert in a repository or a shared folder.

    A repository of the Hugging Face Hub gets all files of the expert in one commit.

    Examples: hub push intents hf:me/intents --dry-run; hub push intents@2 hf:me/intents --tag v2;
    hub push intents file:/mnt/experts
    """
    from experthub.hub.registry.content import Content
    from experthub.hub.registry.expert import Reference
    from experthub.hub.transfer.pull import pull as fetch_experts
    from experthub.hub.transfer.push import push as push_expert

    with open_session(registry) as session:
        expert = session.registry.find_expert(Reference.parse(name))
        fetch_experts(session, Content.from_expert(expert))
        done = push_expert(
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
    print_lines([done.source or "dry run: nothing was sent"])


def export(
    names: Annotated[
        list[str], typer.Argument(help="The experts.", autocompletion=_completion.list_experts)
    ],
    target: Annotated[
        Path, typer.Argument(help="The new archive FILE.tar, or the new folder of --portable.")
    ],
    portable: Annotated[
        bool,
        typer.Option(
            "--portable",
            help="Write one LoRA to a folder that peft, vLLM, SGLang and llama.cpp can load.",
        ),
    ] = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Write experts to an archive, or a LoRA to a folder.

    hub import reads an archive on another machine. --portable writes a folder for other programs.

    Examples: hub export intents sentiment@2 experts.tar; hub export intents --portable ./intents
    """
    from experthub.hub.errors import UsageError
    from experthub.hub.registry.content import Content
    from experthub.hub.registry.expert import Reference
    from experthub.hub.transfer.pull import pull as fetch_experts

    if portable and len(names) > 1:
        raise UsageError("--portable is for one expert", "export the experts one by one")
    if not portable and target.suffix != ".tar":
        raise UsageError(
            f"{target} is not the name of an archive", "write the experts first and FILE.tar last"
        )
    with open_session(registry) as session:
        experts = [session.registry.find_expert(Reference.parse(name)) for name in names]
        fetch_experts(session, *map(Content.from_expert, experts))
    if portable:
        from experthub.hub.composition.export import export_portable

        export_portable(experts[0], target, session)
    else:
        from experthub.hub.transfer.oci_image import make_image, write_archive

        write_archive([make_image(expert, session.store) for expert in experts], target)
    if json:
        listed = [{"name": e.reference, "digest": e.digest} for e in experts]
        print_json({"exported": listed, "out": str(target)})
    else:
        print_lines([f"{e.reference}  {e.digest}" for e in experts])
        print_message(f"wrote {target}")


def import_(
    file: Annotated[Path, typer.Argument(help="The archive FILE.tar.")],
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Import the experts of an archive that hub export wrote.

    Every file is verified, and no path in the archive decides where a file is written.

    Examples: hub import experts.tar
    """
    from experthub.hub.errors import NotFoundError

    if not file.is_file():
        raise NotFoundError(f"{file} does not exist", "name a file that hub export wrote")
    pull([f"file:{file}"], yes=yes, json=json)


def register(app: typer.Typer) -> None:
    """Add the commands `pull`, `push`, `export` and `import` to the application."""
    app.command()(pull)
    app.command()(push)
    app.command()(export)
    app.command("import")(import_)
