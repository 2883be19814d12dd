"""eval: recipes measured zero-shot, next to their base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from experthub.cli._output import (
    DeviceOption,
    JsonOption,
    RegistryOption,
    print_json,
    print_lines,
    print_table,
    progress,
    say,
)


def eval_(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipes; their file names are the columns.")
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            help="Tasks: suite:name, folders, or @FILE with one per line; "
            "repeated, or separated by commas or spaces.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation, test or all.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Examples per task, at most.", min=1)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Score recipes and their base on tasks, by ranking the choices.

    Examples: hub eval phatgoose.yaml uniform.yaml --tasks bigbench:implicatures;
    hub eval *.yaml --tasks @unseen.txt --split all --limit 100 --out results.json
    """
    from experthub.hub._files import write_json
    from experthub.hub.errors import UsageError
    from experthub.hub.registry import Registry
    from experthub.hub.scoring.evaluation import evaluate
    from experthub.hub.tasks.task import as_split

    named = _task_references(tasks or [])
    # `--tasks a:x b:y` leaves b:y among the arguments: a reference to a task is no file's name.
    extra = [r for r in recipes if re.fullmatch(r"[a-z0-9_-]+:[^/:].*", r)]
    files = [r for r in recipes if r not in extra]
    chosen = as_split(split)
    if not named + extra:
        raise UsageError(
            "there is no task to evaluate on", "name some with --tasks; see hub tasks list"
        )
    with progress() as report:
        result = evaluate(
            files,
            [*named, *extra],
            split=chosen,
            limit=limit,
            device=device,
            seed=seed,
            registry=Registry.read(registry),
            report=report,
        )
    if out is not None:
        write_json(out, result)
        say(f"wrote {out}")
    if json:
        print_json(result)
    else:
        print_result(result)


def _task_references(given: list[str]) -> list[str]:
    named: list[str] = []
    for text in given:
        if text.startswith("@"):
            path = Path(text[1:])
            if not path.is_file():
                from experthub.hub.errors import NotFoundError

                raise NotFoundError(
                    f"there is no file {path}", "one task per line is expected in it"
                )
            named += [line.strip() for line in path.read_text().splitlines() if line.strip()]
        else:
            named += [part for part in re.split(r"[,\s]+", text) if part]
    return named


def print_result(result: dict[str, Any]) -> None:
    """Accuracies by task and method, and what the differences to the base amount to."""
    names = list(result["average"])
    rows = [
        [row["task"], str(row["n"]), *(f"{row['methods'][n]['accuracy']:.3f}" for n in names)]
        for row in result["tasks"]
    ]
    average = result["average"]
    total = str(sum(row["n"] for row in result["tasks"]))
    rows.append(["average", total, *(f"{average[n]['accuracy']:.3f}" for n in names)])
    rows.append(["  95 % interval", "", *(_interval(average[n]["ci95"]) for n in names)])
    rows.append(["  log-probability", "", *(f"{average[n]['logprob']:.3f}" for n in names)])
    deltas = [average[n]["delta_to_base"] for n in names]
    rows.append(["  minus base", "", *(f"{d['value']:+.3f}" for d in deltas)])
    rows.append(["  95 % interval", "", *(_interval(d["ci95"], "+.3f") for d in deltas)])
    print_table(["task", ">n", *(f">{n}" for n in names)], rows)
    print_lines(
        [
            "",
            f"accuracy, zero-shot, {result['tasks'][0]['split']} split; "
            "log-probability of the right choice, mean over examples",
        ]
    )


def _interval(ends: list[float], form: str = ".3f") -> str:
    return f"{ends[0]:{form}}..{ends[1]:{form}}"


def register(app: typer.Typer) -> None:
    app.command("eval")(eval_)
