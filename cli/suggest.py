"""suggest: which experts to compose for a task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from experthub.cli import _completion
from experthub.cli._output import (
    DeviceOption,
    JsonOption,
    RegistryOption,
    print_json,
    print_lines,
    print_table,
    say,
)
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.selection.suggestion import Suggestion

NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Experts; all of the base's by default.",
        autocompletion=_completion.list_experts,
    ),
]
ExpertsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--experts",
        help="The same: repeated, or separated by commas or spaces.",
        autocompletion=_completion.list_experts,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(help="The base: the experts' by default.", autocompletion=_completion.list_bases),
]
TaskOption = Annotated[
    str, typer.Option(help="The task: suite:name or a folder.", autocompletion=_completion.list_tasks)
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write a recipe into this file.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the file of --out.")]
EmbedderOption = Annotated[
    str, typer.Option(help="The sentence encoder for embeddings.", autocompletion=_completion.list_bases)
]
ByOption = Annotated[str, typer.Option(help="gates, prototypes, embeddings, tmi or all.")]
RankByOption = Annotated[
    str | None, typer.Option(help="The measure that decides; the best of those there are.")
]
CountOption = Annotated[
    int | None, typer.Option("--k", help="Experts of the recipe: 5, or all if fewer.", min=1)
]
ExamplesOption = Annotated[int, typer.Option(help="Examples that are read, at most.", min=1)]
LabelsOption = Annotated[
    bool, typer.Option("--labels/--no-labels", help="Look at the right answers, for tmi.")
]
RelativeOption = Annotated[
    bool,
    typer.Option(
        "--relative/--absolute",
        help="Divide gates and prototypes by what an expert gets on the experts' own tasks.",
    ),
]
TruthOption = Annotated[
    bool, typer.Option("--truth", help="Evaluate every expert alone, to judge the measures.")
]
SplitOption = Annotated[str, typer.Option(help="For --truth.", autocompletion=_completion.list_splits)]
LimitOption = Annotated[int | None, typer.Option(help="Examples for --truth, at most.", min=1)]
MethodOption = Annotated[
    str | None,
    typer.Option(
        help="Of the recipe; phatgoose, or arrow where gates are missing.",
        autocompletion=_completion.list_methods,
    ),
]

RELATIVE = "; gates and prototypes relative to what an expert gets on the experts' own tasks"


def suggest(
    task: TaskOption,
    names: NamesArgument = None,
    experts: ExpertsOption = None,
    base: BaseOption = None,
    by: ByOption = "all",
    rank_by: RankByOption = None,
    k: CountOption = None,
    examples: ExamplesOption = 32,
    labels: LabelsOption = False,
    relative: RelativeOption = True,
    truth: TruthOption = False,
    split: SplitOption = "test",
    limit: LimitOption = None,
    out: OutOption = None,
    method: MethodOption = None,
    force: ForceOption = False,
    embedder: EmbedderOption = "all-minilm-l6-v2",
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Rank experts for a task by a few of its examples, and write a recipe with the best.

    Examples: hub suggest --task bigbench:implicatures --base smollm2-135m-instruct --k 3 --out recipe.yaml;
    hub suggest sentiment question-typing --task ./my-task --by gates;
    hub suggest --task bigbench:snarks --base all-minilm-l6-v2 --labels --truth
    """
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.selection.measuring import suggest
    from experthub.hub.selection.recipe_writing import check_request
    from experthub.hub.selection.suggestion import parse_ranking_measure, write_suggestion
    from experthub.hub.tasks.task import parse_split

    reuse_memory()
    check_request(out, force, method)
    with open_session(registry, device) as session:
        found = suggest(
            task,
            named(names, experts),
            base=base,
            by=parse_ranking_measure(by),
            rank_by=None if rank_by is None else parse_ranking_measure(rank_by),
            k=k,
            examples=examples,
            labels=labels,
            relative=relative,
            truth=truth,
            split=parse_split(split),
            limit=limit,
            embedder=embedder,
            session=session,
        )
        if out is not None:
            write_suggestion(found, k, out, session, method)
    if json:
        print_json(
            {**found.record(), "best": found.select_best(k), "recipe": str(out) if out else None}
        )
    else:
        _print_suggestion(found)
    if out:
        say(f"wrote {out}")


def named(*given: list[str] | None) -> list[str]:
    """The experts of an argument and an option, each of which may hold several."""
    texts = [text for some in given for text in some or ()]
    return [name for text in texts for name in re.split(r"[,\s]+", text) if name]


def _print_suggestion(found: Suggestion) -> None:
    """A row for each expert: its score and rank by each measure, and what it does alone."""
    measures = list(found.scores)
    rows = []
    for row in found.record()["experts"]:
        cells = [row["expert"], row["task"] or ""]
        for measure in measures:
            score, rank = row["scores"][measure], row["ranks"][measure]
            cells += ["-" if score is None else f"{score:.4g}", "" if rank is None else str(rank)]
        rows.append([*cells, *(f"{value:.3f}" for value in row.get("truth", {}).values())])
    columns = [column for measure in measures for column in (f">{measure}", ">rank")]
    print_table(["expert", "trained on", *columns, *(f">{kind}" for kind in found.truth)], rows)
    print_lines(
        [
            "",
            f"{found.task.reference}: {found.examples} training examples, "
            f"{'with' if found.labels else 'without'} labels; ordered by {found.rank_by}"
            f"{RELATIVE if found.relative else ''}",
        ]
    )
    if found.truth:
        _print_correlations(found)


def _print_correlations(found: Suggestion) -> None:
    """How each measure ranks, against what every expert does alone."""
    rows = []
    for measure, own in found.compute_correlations().items():
        for kind, judged in own.items():
            ranks = [_signed(judged[name]) for name in ("spearman", "kendall")]
            values = [f"{judged[name]:.3f}" for name in ("first", "best", "mean")]
            rows.append([measure, kind, *ranks, str(judged["n"]), *values])
    print_lines(["", f"against what each expert does alone on {found.n} examples:"])
    columns = [">spearman", ">kendall", ">experts", ">of the first", ">of the best", ">mean"]
    print_table(["measure", "truth", *columns], rows)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def register(app: typer.Typer) -> None:
    app.command()(suggest)
