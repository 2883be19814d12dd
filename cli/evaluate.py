"""eval: recipes measured zero-shot, next to their base."""

from __future__ import annotations

import re
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from experthub.cli import _completion
from experthub.cli._arguments import task_references
from experthub.cli._output import (
    DeviceOption,
    FrozenOption,
    JsonOption,
    LockedOption,
    RegistryOption,
    pins_of,
    print_json,
    print_lines,
    print_table,
    say,
)
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.recipes.plan import Plan
    from experthub.hub.session import Session

TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        "-t",
        help="Tasks: suite:name, folders, or @FILE with one per line; "
        "repeated, or separated by commas or spaces.",
        autocompletion=_completion.tasks,
    ),
]
ScoreOption = Annotated[
    str,
    typer.Option(
        help="Of a choice, from its tokens' log-probabilities: mean, sum or byte.",
        autocompletion=_completion.measures,
    ),
]
ControlsOption = Annotated[
    bool, typer.Option("--controls", help="Add the best single expert, the oracle, and the mean.")
]
CacheOption = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Use and keep the scores of earlier runs.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the result as JSON.")]
SamplesOption = Annotated[
    Path | None,
    typer.Option("--samples", help="Write every example's scores, one JSON record per line."),
]
PlotsOption = Annotated[
    Path | None,
    typer.Option("--plots", help="Write pictures into this folder: table and routing maps."),
]


def eval_(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipes; their file names are the columns.")
    ],
    tasks: TasksOption = None,
    split: Annotated[
        str,
        typer.Option(help="train, validation, test or all.", autocompletion=_completion.splits),
    ] = "test",
    limit: Annotated[int | None, typer.Option(help="Examples per task, at most.", min=1)] = None,
    score: ScoreOption = "mean",
    controls: ControlsOption = False,
    cache: CacheOption = True,
    out: OutOption = None,
    samples: SamplesOption = None,
    plots: PlotsOption = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Score recipes and their base on tasks, by ranking the choices.

    Examples: hub eval phatgoose.yaml uniform.yaml --tasks bigbench:implicatures;
    hub eval *.yaml --tasks @unseen.txt --split all --limit 100 --out results.json;
    hub eval phatgoose.yaml --tasks @unseen.txt --controls --plots pictures
    """
    from experthub.hub.evaluation.evaluation import evaluate
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.readers.scorer import parse_measure
    from experthub.hub.recipes.lock import plan_of
    from experthub.hub.tasks.task import parse_split

    reuse_memory()
    files, named = _files_and_tasks(recipes, tasks or [])
    pins = pins_of(locked, frozen)
    with open_session(registry, device) as session:
        result = evaluate(
            files,
            named,
            split=parse_split(split),
            limit=limit,
            score=parse_measure(score),
            controls=controls,
            cache=cache,
            with_samples=samples is not None,
            pins=pins,
            seed=seed,
            session=session,
        )
    _write(result, out, samples)
    if plots is not None:
        plans = {Path(file).stem: plan_of(file, pins, session=session) for file in files}
        _plot(result, plans, plots, session)
    if json:
        print_json(result)
    else:
        print_result(result)


def _files_and_tasks(recipes: list[str], tasks: list[str]) -> tuple[list[str], list[str]]:
    """The recipes' files, and the tasks that were named.

    `--tasks a:x b:y` leaves b:y among the arguments: a reference to a task is no file's name.
    """
    named = task_references(tasks)
    named += [r for r in recipes if re.fullmatch(r"[a-z0-9_-]+:[^/:].*", r)]
    if not named:
        from experthub.hub.errors import UsageError

        raise UsageError(
            "there is no task to evaluate on", "name some with --tasks; see hub tasks list"
        )
    return [r for r in recipes if r not in named], named


def _write(result: dict[str, Any], out: Path | None, samples: Path | None) -> None:
    from experthub.hub.files.atomic import write_json, write_text

    if samples is not None:
        lines = (dumps(row, ensure_ascii=False) + "\n" for row in result.pop("samples"))
        write_text(samples, "".join(lines))
        say(f"wrote {samples}")
    if out is not None:
        write_json(out, result)
        say(f"wrote {out}")


def _plot(result: dict[str, Any], plans: dict[str, Plan], folder: Path, session: Session) -> None:
    """Draw the table of scores, and the routing of each recipe that routes."""
    from experthub.hub.errors import UsageError
    from experthub.hub.evaluation.plots import plot_result, plot_routing
    from experthub.hub.evaluation.routing_map import routing_map

    plot_result(result, folder / "table.png")
    say(f"wrote {folder / 'table.png'}")
    tasks = [row["task"] for row in result["tasks"]]
    for name, plan in plans.items():
        if plan.routed:
            picture = folder / f"{name}-routing.png"
            try:
                found = routing_map(plan, tasks, session=session)
            except UsageError as error:  # images, say: the scores are there all the same
                say(f"no {picture}: {error.message}")
                continue
            plot_routing(found, name, picture)
            say(f"wrote {picture}")


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
            *in_words(result),
        ]
    )


def in_words(result: dict[str, Any]) -> list[str]:
    """What the table shows, in plain sentences: a difference is clear if its interval is."""
    said = []
    for name in result["recipes"]:
        delta = result["average"][name]["delta_to_base"]
        tasks = [row["methods"][name]["delta_to_base"]["ci95"] for row in result["tasks"]]
        better, worse = sum(low > 0 for low, _ in tasks), sum(high < 0 for _, high in tasks)
        said.append(
            f"{name}: {_verdict(delta, 'the base')} on average; "
            f"clearly better on {better} and worse on {worse} of {len(tasks)} tasks"
        )
    said += [
        f"{pair['recipe']}: {_verdict(pair, pair['than'])} on average"
        for pair in result["comparisons"]
    ]
    if "controls" in result:
        said.append(f"best_individual is {result['controls']['best_individual']}")
    return said


def _verdict(delta: dict[str, Any], than: str) -> str:
    low, high = delta["ci95"]
    words = "better than" if low > 0 else "worse than" if high < 0 else "not clearly other than"
    return f"{words} {than} ({delta['value']:+.3f}, 95 % {_interval(delta['ci95'], '+.3f')})"


def _interval(ends: list[float], form: str = ".3f") -> str:
    return f"{ends[0]:{form}}..{ends[1]:{form}}"


def register(app: typer.Typer) -> None:
    app.command("eval")(eval_)
