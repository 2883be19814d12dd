"""`hub eval`: evaluate recipes and their base on tasks, zero-shot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from experthub.cli import _completion
from experthub.cli._arguments import read_task_references
from experthub.cli._options import (
    TASKS_HELP,
    DeviceOption,
    FrozenOption,
    JsonOption,
    LockedOption,
    LongOption,
    RegistryOption,
)
from experthub.cli._output import choose_pins, print_json, print_lines, print_message, print_table
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.recipes.plan import Plan
    from experthub.hub.session import Session

TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        "-t",
        help=TASKS_HELP,
        autocompletion=_completion.list_tasks,
    ),
]
SplitOption = Annotated[
    str,
    typer.Option(
        help="The split: train, validation, test or all.",
        autocompletion=_completion.list_splits,
    ),
]
ScoreOption = Annotated[
    str,
    typer.Option(
        help="The score of a choice, from its tokens' log-probabilities: mean, sum, or byte "
        "(the sum divided by the number of bytes).",
        autocompletion=_completion.list_measures,
    ),
]
ControlsOption = Annotated[
    bool,
    typer.Option(
        "--controls",
        help="Add controls: the best single expert, the best expert of each task (oracle), and the "
        "mean of all experts.",
    ),
]
CacheOption = Annotated[
    bool,
    typer.Option("--cache/--no-cache", help="Reuse the scores of earlier runs, and keep new ones."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Write the result to this JSON file.")
]
SamplesOption = Annotated[
    Path | None,
    typer.Option(
        "--samples",
        help="Write the scores of every example to this file, one JSON record per line.",
    ),
]
PlotsOption = Annotated[
    Path | None,
    typer.Option("--plots", help="Draw the table and maps of the routing in this folder."),
]


def eval_(
    recipes: Annotated[
        list[str], typer.Argument(help="The recipes; their file names become the columns.")
    ],
    tasks: TasksOption = None,
    split: SplitOption = "test",
    limit: Annotated[
        int | None, typer.Option(help="The largest number of examples per task.", min=1)
    ] = None,
    score: ScoreOption = "mean",
    controls: ControlsOption = False,
    cache: CacheOption = True,
    long: LongOption = "cut",
    out: OutOption = None,
    samples: SamplesOption = None,
    plots: PlotsOption = None,
    seed: Annotated[int, typer.Option(help="The seed of the bootstrap.")] = 0,
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Evaluate recipes and their base on tasks, zero-shot.

    The model's answer to an example is the choice with the highest score. The table shows
    accuracies, log-probabilities and differences to the base, with 95 % intervals.

    Examples: hub eval phatgoose.yaml uniform.yaml --tasks bigbench:implicatures;
    hub eval *.yaml --tasks @unseen.txt --split all --limit 100 --out results.json;
    hub eval phatgoose.yaml --tasks @unseen.txt --controls --plots pictures
    """
    from experthub.hub.evaluation.evaluation import evaluate
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.readers.scorer import parse_long, parse_measure
    from experthub.hub.recipes.lock import plan_of
    from experthub.hub.tasks.task import parse_split

    _check_outputs(out, samples, plots and plots / "table.png")
    reuse_memory()
    files, named = _separate(recipes, tasks or [])
    pins = choose_pins(locked, frozen)
    with open_session(registry, device) as session:
        result = evaluate(
            files,
            named,
            split=parse_split(split),
            limit=limit,
            score=parse_measure(score),
            controls=controls,
            cache=cache,
            long=parse_long(long),
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


def _separate(recipes: list[str], tasks: list[str]) -> tuple[list[str], list[str]]:
    """Separate the files of recipes from the references of tasks.

    `--tasks a:x b:y` leaves b:y among the arguments; it is not the name of a file.
    """
    named = read_task_references(tasks)
    named += [r for r in recipes if re.fullmatch(r"[a-z0-9_-]+:[^/:].*", r)]
    if not named:
        from experthub.hub.errors import UsageError

        raise UsageError(
            "no tasks were given", "name tasks with --tasks; hub tasks list shows them"
        )
    return [r for r in recipes if r not in named], named


def _check_outputs(*paths: Path | None) -> None:
    """Refuse paths that cannot be written, before the evaluation begins."""
    from experthub.hub.files.path_checks import check_file

    for path in filter(None, paths):
        check_file(path)


def _write(result: dict[str, Any], out: Path | None, samples: Path | None) -> None:
    """Write the samples, which are removed from the result, and the result."""
    from experthub.hub.files.atomic import write_json, write_text
    from experthub.hub.files.digests import encode_json

    if samples is not None:
        lines = (encode_json(row) + "\n" for row in result.pop("samples"))
        write_text(samples, "".join(lines))
        print_message(f"wrote {samples}")
    if out is not None:
        write_json(out, result)
        print_message(f"wrote {out}")


def _plot(result: dict[str, Any], plans: dict[str, Plan], folder: Path, session: Session) -> None:
    """Draw the table of scores, and the routing of each recipe that routes."""
    from experthub.hub.errors import UsageError
    from experthub.hub.evaluation.plots import plot_result, plot_routing
    from experthub.hub.evaluation.routing_map import map_routing

    plot_result(result, folder / "table.png")
    print_message(f"wrote {folder / 'table.png'}")
    tasks = [row["task"] for row in result["tasks"]]
    for name, plan in plans.items():
        if plan.routed:
            picture = folder / f"{name}-routing.png"
            try:
                found = map_routing(plan, tasks, session=session)
            except UsageError as error:  # Some bases, such as CLIP, have scores but no map.
                print_message(f"cannot draw {picture}: {error.message}")
                continue
            plot_routing(found, name, picture)
            print_message(f"wrote {picture}")


def print_result(result: dict[str, Any]) -> None:
    """Print accuracies by task and method, and what the differences to the base mean.

    Args:
        result: The result of an evaluation.
    """
    names = list(result["average"])
    rows = [
        [row["task"], str(row["n"]), *(f"{row['methods'][n]['accuracy']:.3f}" for n in names)]
        for row in result["tasks"]
    ]
    average = result["average"]
    total = str(sum(row["n"] for row in result["tasks"]))
    rows.append(["average", total, *(f"{average[n]['accuracy']:.3f}" for n in names)])
    rows.append(["  95 % interval", "", *(_format_interval(average[n]["ci95"]) for n in names)])
    rows.append(["  log-probability", "", *(f"{average[n]['logprob']:.3f}" for n in names)])
    deltas = [average[n]["delta_to_base"] for n in names]
    rows.append(["  minus base", "", *(f"{d['value']:+.3f}" for d in deltas)])
    rows.append(["  95 % interval", "", *(_format_interval(d["ci95"], "+.3f") for d in deltas)])
    print_table(["task", ">n", *(f">{n}" for n in names)], rows)
    print_lines(
        [
            "",
            f"zero-shot accuracy on the {result['tasks'][0]['split']} split; "
            "log-probability: of the right choice, mean over examples",
            *explain_result(result),
        ]
    )


def explain_result(result: dict[str, Any]) -> list[str]:
    """Explain a result in words; a difference is clear if its interval does not contain zero.

    Args:
        result: The result of an evaluation.

    Returns:
        One line for each recipe and each comparison of recipes.
    """
    lines = []
    for name in result["recipes"]:
        delta = result["average"][name]["delta_to_base"]
        tasks = [row["methods"][name]["delta_to_base"]["ci95"] for row in result["tasks"]]
        better, worse = sum(low > 0 for low, _ in tasks), sum(high < 0 for _, high in tasks)
        lines.append(
            f"{name}: {_judge(delta, 'the base')} on average; "
            f"clearly better on {better} and clearly worse on {worse} of {len(tasks)} tasks"
        )
    lines += [
        f"{pair['recipe']}: {_judge(pair, pair['than'])} on average"
        for pair in result["comparisons"]
    ]
    if "controls" in result:
        lines.append(f"best_individual is the expert {result['controls']['best_individual']}")
    return lines


def _judge(delta: dict[str, Any], than: str) -> str:
    """Describe a difference with its interval."""
    low, high = delta["ci95"]
    words = "better than" if low > 0 else "worse than" if high < 0 else "not clearly different from"
    interval = _format_interval(delta["ci95"], "+.3f")
    return f"{words} {than} ({delta['value']:+.3f}, 95 % interval {interval})"


def _format_interval(ends: list[float], form: str = ".3f") -> str:
    """Format the two ends of an interval."""
    return f"{ends[0]:{form}}..{ends[1]:{form}}"


def register(app: typer.Typer) -> None:
    """Add the command `eval` to the application."""
    app.command("eval")(eval_)
