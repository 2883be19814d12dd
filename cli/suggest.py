"""`hub suggest`: rank experts for a task, and write a recipe with the best ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from experthub.cli import _completion
from experthub.cli._arguments import split_names
from experthub.cli._options import DeviceOption, JsonOption, RegistryOption, TaskOption
from experthub.cli._output import print_json, print_lines, print_message, print_table
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.selection.suggestion import Suggestion

NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="The experts; by default all experts of the base.",
        autocompletion=_completion.list_experts,
    ),
]
ExpertsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--experts",
        help="More experts. Repeat the option, or separate names by commas or spaces.",
        autocompletion=_completion.list_experts,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        help="The base; the base of the experts by default.", autocompletion=_completion.list_bases
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write a recipe to this new file.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace the file of --out if it exists.")
]
EmbedderOption = Annotated[
    str,
    typer.Option(help="The sentence encoder of embeddings.", autocompletion=_completion.list_bases),
]
ByOption = Annotated[
    str, typer.Option(help="The measure: gates, prototypes, embeddings, tmi or all.")
]
RankByOption = Annotated[
    str | None,
    typer.Option(help="The measure that orders the experts; the best available one by default."),
]
CountOption = Annotated[
    int | None,
    typer.Option(
        "--k",
        help="The number of experts in the recipe. The default is 5, or all experts if there are "
        "fewer.",
        min=1,
    ),
]
ExamplesOption = Annotated[
    int, typer.Option(help="The largest number of examples that are read.", min=1)
]
LabelsOption = Annotated[
    bool, typer.Option("--labels/--no-labels", help="Let tmi use the right answers.")
]
RelativeOption = Annotated[
    bool,
    typer.Option(
        "--relative/--absolute",
        help="Divide gates and prototypes by the weight that an expert usually gets.",
    ),
]
TruthOption = Annotated[
    bool,
    typer.Option("--truth", help="Also evaluate every expert alone, to judge the measures."),
]
SplitOption = Annotated[
    str,
    typer.Option(
        help="The split that --truth evaluates on.", autocompletion=_completion.list_splits
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(help="The largest number of examples for --truth.", min=1)
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        help="The method of the recipe; by default phatgoose, arrow if gates are missing, or linear "
        "if an expert is dense.",
        autocompletion=_completion.list_methods,
    ),
]

RELATIVE = "; gates and prototypes are divided by the weight that an expert usually gets"


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
    """Rank experts for a task by a few of its examples.

    The table shows the score and the rank of every expert by each measure. --out writes a recipe
    with the best experts.

    Examples: hub suggest --task bigbench:implicatures --base smollm2-135m-instruct --k 3 --out recipe.yaml;
    hub suggest sentiment question-typing --task ./my-task --by gates;
    hub suggest --task bigbench:snarks --base all-minilm-l6-v2 --labels --truth
    """
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.selection.measuring import suggest
    from experthub.hub.selection.recipe_writing import check_recipe_file
    from experthub.hub.selection.suggestion import parse_ranking_measure, write_suggestion
    from experthub.hub.tasks.task import parse_split

    reuse_memory()
    check_recipe_file(out, force, method)
    with open_session(registry, device) as session:
        found = suggest(
            task,
            split_names(names, experts),
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
        print_message(f"wrote {out}")


def _print_suggestion(found: Suggestion) -> None:
    """Print a row for each expert: its scores and ranks by measure, and its result alone."""
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
    """Print how well each measure agrees with the results of the experts alone."""
    rows = []
    for measure, own in found.compute_correlations().items():
        for kind, judged in own.items():
            ranks = [_format_correlation(judged[name]) for name in ("spearman", "kendall")]
            values = [f"{judged[name]:.3f}" for name in ("first", "best", "mean")]
            rows.append([measure, kind, *ranks, str(judged["n"]), *values])
    print_lines(["", f"compared with the results of each expert alone on {found.n} examples:"])
    columns = [">spearman", ">kendall", ">experts", ">first ranked", ">best", ">mean"]
    print_table(["measure", "truth", *columns], rows)


def _format_correlation(value: float | None) -> str:
    """Format a correlation with its sign."""
    return "-" if value is None else f"{value:+.2f}"


def register(app: typer.Typer) -> None:
    """Add the command `suggest` to the application."""
    app.command()(suggest)
