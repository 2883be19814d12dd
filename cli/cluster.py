"""`hub cluster`: group similar experts, and write a recipe that routes between the groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from experthub.cli._arguments import split_names
from experthub.cli._options import JsonOption, RegistryOption
from experthub.cli._output import print_json, print_lines, print_message, print_table
from experthub.cli._session import open_session
from experthub.cli.suggest import (
    BaseOption,
    EmbedderOption,
    ExpertsOption,
    ForceOption,
    NamesArgument,
    OutOption,
)

if TYPE_CHECKING:
    from experthub.hub.selection.clusters import Clusters


def cluster(
    names: NamesArgument = None,
    experts: ExpertsOption = None,
    base: BaseOption = None,
    k: Annotated[int, typer.Option("--k", help="The number of groups.", min=1)] = 4,
    by: Annotated[
        str, typer.Option(help="The measure of similarity: weights, gates or embeddings.")
    ] = "weights",
    rank: Annotated[
        int | None,
        typer.Option(help="Truncate each group's merge to this rank; exact by default.", min=1),
    ] = None,
    out: OutOption = None,
    method: Annotated[str, typer.Option(help="The router between the groups.")] = "arrow",
    force: ForceOption = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the similarities as a heat map in this PNG file."),
    ] = None,
    embedder: EmbedderOption = "all-minilm-l6-v2",
    json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Group similar experts.

    The tables show the groups and the cosines between all experts. --out writes a recipe that
    merges each group and routes between the groups.

    Examples: hub cluster --base smollm2-135m-instruct --k 4 --out recipe.yaml;
    hub cluster sentiment intent-recognition question-typing --k 2 --by gates --plot alike.png;
    hub cluster --base all-minilm-l6-v2 --k 3 --rank 8 --method phatgoose --out recipe.yaml
    """
    from experthub.hub.errors import UsageError
    from experthub.hub.evaluation.plots import plot_similarity
    from experthub.hub.files.path_checks import check_file
    from experthub.hub.selection.clusters import cluster, parse_similarity, write_clusters
    from experthub.hub.selection.recipe_writing import check_recipe_file

    check_recipe_file(out, force, method, routes_only=True)
    if plot is not None:
        check_file(plot)
        if out is not None and plot.resolve() == out.resolve():
            raise UsageError(f"--out and --plot are both {out}", "choose two different files")
    with open_session(registry) as session:
        found = cluster(
            split_names(names, experts),
            base=base,
            k=k,
            by=parse_similarity(by),
            embedder=embedder,
            session=session,
        )
        if out is not None:
            write_clusters(found, out, session, method, rank)
    if plot is not None:
        order = [e for group in found.groups for e in group]
        rows = [[found.similarity[e][f] for f in order] for e in order]
        plot_similarity(rows, [found.plan.experts[e].label for e in order], by, plot)
    if json:
        print_json({**found.record(), "by": by, "recipe": str(out) if out else None})
    else:
        _print(found)
    for path in filter(None, (out, plot)):
        print_message(f"wrote {path}")


def _print(found: Clusters) -> None:
    """Print the groups, and the cosines between their experts in the same order."""
    order = [e for group in found.groups for e in group]
    labels = [expert.label for expert in found.plan.experts]
    rows: list[list[str]] = []
    for number, group in enumerate(found.groups, 1):
        mean = found.mean_cosine(group)
        members = ", ".join(labels[e] for e in group)
        rows.append([f"group-{number}", "" if mean is None else f"{mean:+.3f}", members])
    print_table(["group", ">mean cosine", "experts"], rows)
    print_lines(["", "cosines:"])
    numbered = {e: str(place) for place, e in enumerate(order, 1)}
    print_table(
        [">", "expert", *(f">{numbered[e]}" for e in order)],
        [
            [numbered[e], labels[e], *(f"{found.similarity[e][f]:+.3f}" for f in order)]
            for e in order
        ],
    )


def register(app: typer.Typer) -> None:
    """Add the command `cluster` to the application."""
    app.command()(cluster)
