"""`hub tasks`: list and import tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from experthub.cli._options import JsonOption, QuietOption
from experthub.cli._output import print_json, print_lines, print_message, print_table
from experthub.cli._session import open_session

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List and import tasks.")


@app.command("list")
def list_(json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the imported tasks.

    Examples: hub tasks list; hub tasks list --json
    """
    from experthub.hub.tasks.task_files import list_references, read_task

    references = list_references()
    if quiet:
        print_lines(references)
        return
    tasks = [read_task(reference) for reference in references]
    if json:
        print_json(
            {
                "tasks": [
                    {"task": t.reference, "digest": t.digest, "n": len(t.examples)}
                    | t.card.model_dump(mode="json")
                    for t in tasks
                ]
            }
        )
        return
    if not tasks:
        print_message(
            "no task is imported yet; run hub tasks import bigbench implicatures to import one"
        )
    print_table(
        ["task", "kind", ">examples", "source", "category"],
        [
            [t.reference, t.card.kind, str(len(t.examples)), t.card.source, t.card.category or ""]
            for t in tasks
        ],
    )


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(help="bigbench, a folder with a card.yaml, or a folder of such folders."),
    ],
    names: Annotated[
        list[str] | None, typer.Argument(help="The tasks of BIG-bench; all by default.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="The suite that the tasks of a folder are put into; local by default."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Import tasks from BIG-bench or from a folder.

    A task of BIG-bench is omitted if none of its examples has exactly one right answer.

    Examples: hub tasks import bigbench implicatures snarks; hub tasks import ./my-task --suite mine
    """
    from experthub.hub.errors import UsageError

    left_out: list[str] = []
    if source == "bigbench":
        if suite is not None:
            raise UsageError("--suite is for folders, and not for bigbench", "remove --suite")
        from experthub.hub.tasks.bigbench import import_tasks

        with open_session() as session:
            imported, left_out = import_tasks(names or [], session)
    else:
        if names:
            raise UsageError(
                f"names of tasks are for bigbench, and {source} is a folder",
                f"remove {' '.join(names)}",
            )
        from experthub.hub.tasks.task_files import import_folder

        imported = import_folder(Path(source), suite or "local")
    for line in left_out:
        print_message(f"left out {line}")
    if json:
        print_json({"imported": imported, "left_out": left_out})
    else:
        print_lines(imported)
