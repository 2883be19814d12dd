"""`hub verify`, `rm`, `du` and `gc`: check, remove, measure and collect what the hub stores."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from experthub.cli import _completion
from experthub.cli._options import DryRunOption, JsonOption, RegistryOption, YesOption
from experthub.cli._output import (
    ask,
    format_megabytes,
    print_json,
    print_lines,
    print_table,
)
from experthub.cli._session import open_session


def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Fetch damaged content again from its sources.")
    ] = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Check all stored content against its digests.

    Registry entries and locks are followed to the files that they name. The command exits with
    code 3 if something is damaged, or if --repair cannot repair an incomplete expert.

    Examples: hub verify; hub verify --repair; hub verify --json
    """
    from experthub.hub.maintenance.verification import raise_if_damaged
    from experthub.hub.maintenance.verification import verify as verify_store

    with open_session() as session:
        found = verify_store(session, registry, repair=repair)
    if json:
        print_json({"verify": found.record()})
    else:
        lines = [f"{found.objects} objects, {format_megabytes(found.bytes)}"]
        rows = [
            (sha256, f"{sha256[:12]}  {', '.join(users) or 'not used by any entry'}")
            for sha256, users in found.damaged.items()
        ]
        rows += [(base, f"base {base}: {', '.join(files)}") for base, files in found.bases.items()]
        rows += [(name, f"{name}: {', '.join(files)}") for name, files in found.folders.items()]
        rows += [(name, name) for name in found.texts]
        lines += [
            f"{'repaired' if name in found.repaired else 'damaged'}  {row}" for name, row in rows
        ]
        for reference in found.incomplete:
            state = "repaired" if reference in found.repaired else "incomplete"
            lines.append(f"{state}  {reference}")
        lines += [f"not an object  {name}" for name in found.strangers]
        if found.absent:
            lines.append(f"not pulled  {', '.join(found.absent)}")
        if found.orphans:
            lines.append(
                f"{len(found.orphans)} objects are not used by any entry; hub gc deletes them"
            )
        print_lines(lines)
    raise_if_damaged(found)


def rm(
    name: Annotated[
        str,
        typer.Argument(
            help="The expert: NAME for all versions, or NAME@2.",
            autocompletion=_completion.list_experts,
        ),
    ],
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Remove an expert from your own registry.

    Its files stay in the store until hub gc deletes them.

    Examples: hub rm intents; hub rm intents@1 --yes
    """
    from experthub.hub.maintenance.collection import find_removable
    from experthub.hub.registry.entries import remove
    from experthub.hub.registry.registry import Registry

    known = Registry.read()
    mine = find_removable(name, known)
    _confirm(f"remove {', '.join(e.reference for e in mine)}?", yes)
    remove(mine)
    if json:
        print_json({"removed": [{"name": e.reference, "digest": e.digest} for e in mine]})
    else:
        print_lines([f"{e.reference}  {e.digest}" for e in mine])


def du(json: JsonOption = False, registry: RegistryOption = None) -> None:
    """Show the disk space that the hub uses.

    The sizes are listed by purpose and by expert. An expert's files can be shared with others.

    Examples: hub du; hub du --json
    """
    from experthub.hub.maintenance.usage import measure_usage
    from experthub.hub.registry.registry import Registry
    from experthub.hub.session import Session

    found = measure_usage(Session(Registry.read(registry)))
    if json:
        print_json(found)
        return
    rows = [
        [f["folder"], format_megabytes(f["bytes"]), f["purpose"]]
        for f in found["folders"]
        if f["bytes"]
    ]
    print_table(
        ["folder", ">size", "content"],
        [*rows, ["total", format_megabytes(found["bytes"]), found["root"]]],
    )
    if found["experts"]:
        print_lines([""])
        print_table(
            ["expert", ">size", ">not shared"],
            [
                [e["expert"], format_megabytes(e["bytes"]), format_megabytes(e["own"])]
                for e in found["experts"]
            ],
        )


def gc(
    grace: Annotated[
        float,
        typer.Option(
            help="The number of seconds that an unused object is kept before each step.", min=0.0
        ),
    ] = 3600.0,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Delete content that nothing needs, in two steps.

    Content is needed by registries, lock files and running processes. The first run moves all other
    content to the trash, from which any use restores it. A later run deletes it.

    Examples: hub gc --dry-run; hub gc; hub gc --grace 0 --yes
    """
    from experthub.hub.maintenance.collection import collect
    from experthub.hub.store.store import Store

    store = Store()
    planned = collect(registry, store, grace=grace, dry_run=True)
    done = planned
    if not dry_run:
        if planned.deleted:
            size = format_megabytes(sum(planned.deleted.values()))
            _confirm(f"delete {len(planned.deleted)} objects, {size}?", yes)
        done = collect(registry, store, grace=grace)
    if json:
        print_json({"gc": vars(done) | {"dry_run": dry_run}})
        return
    parts = {
        "moved to the trash": done.trashed,
        "deleted": done.deleted,
        "deleted as leftovers of stopped processes": done.leftovers,
    }
    would = "would be " if dry_run else ""
    lines = [
        f"{would}{what}: {len(found)}, {format_megabytes(sum(found.values()))}"
        for what, found in parts.items()
    ]
    print_lines([*lines, f"{would}restored: {len(done.restored)}"])


def _confirm(question: str, yes: bool) -> None:
    """Ask the user on a terminal, and refuse elsewhere."""
    from experthub.hub.errors import UsageError

    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(
            f"cannot ask for confirmation without a terminal: {question}", "pass --yes"
        )
    if not ask(question):
        raise UsageError("nothing was done", "pass --yes, or answer y")


def register(app: typer.Typer) -> None:
    """Add the commands `verify`, `rm`, `du` and `gc` to the application."""
    for command in (verify, rm, du, gc):
        app.command()(command)
