"""Plots of results, routing weights, coefficients and similarities; they need matplotlib."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from experthub.hub.errors import HubError
from experthub.hub.files.atomic import open_atomically
from experthub.hub.files.safe_text import escape


def plot_result(result: dict[str, Any], path: Path) -> None:
    """Plot a table of accuracies by task and column, coloured by the difference to the base.

    Args:
        result: A result of `evaluate`.
        path: The PNG file to write.

    Raises:
        HubError: matplotlib is not installed.
    """
    names = list(result["average"])
    rows = [
        (row["task"].partition(":")[2] or row["task"], row["methods"]) for row in result["tasks"]
    ]
    rows.append(("average", result["average"]))
    accuracies = [[scores[name]["accuracy"] for name in names] for _, scores in rows]
    deltas = [[scores[name]["delta_to_base"] for name in names] for _, scores in rows]
    figure, axes = _create_figure(1.25 * len(names) + 3, 0.36 * len(rows) + 1.3)
    values = [[d["value"] for d in row] for row in deltas]
    axes.imshow(values, cmap="RdBu", vmin=-0.4, vmax=0.4, aspect="auto")
    for i, row in enumerate(accuracies):
        for j, accuracy in enumerate(row):
            low, high = deltas[i][j]["ci95"]
            clear = low > 0 or high < 0
            dark = abs(values[i][j]) > 0.25
            axes.text(
                j,
                i,
                f"{accuracy:.3f}",
                ha="center",
                va="center",
                weight="bold" if clear else "normal",
                color="white" if dark else "black",
            )
    axes.set_xticks(range(len(names)), map(_label, names), rotation=20, ha="left")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), [_label(name) for name, _ in rows])
    axes.axhline(len(rows) - 1.5, color="black", linewidth=1)
    n = sum(row["n"] for row in result["tasks"])
    axes.set_xlabel(
        f"accuracy, zero-shot, {n} examples; blue: above the base, red: below;\n"
        "bold: the 95 % interval of the paired difference excludes zero"
    )
    _save(figure, path)


def plot_routing(found: dict[str, Any], name: str, path: Path) -> None:
    """Plot a heat map of the mean weight of every expert in every layer.

    Args:
        found: A routing map of `map_routing`.
        name: The name of the recipe.
        path: The PNG file to write.

    Raises:
        HubError: matplotlib is not installed.
    """
    layers, experts = found["layers"], found["experts"]
    figure, axes = _create_figure(0.55 * len(experts) + 3, 0.2 * len(layers) + 2.2)
    image = axes.imshow(found["weights"], cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(experts)), map(_label, experts), rotation=35, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    axes.set_title(f"{_label(name)}: mean weight over {found['tokens']} tokens", fontsize=10)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def plot_coefficients(
    values: list[list[float]], experts: list[str], blocks: list[str], name: str, path: Path
) -> None:
    """Plot a heat map of the coefficient of every expert and block, with zero as the middle colour.

    Args:
        values: The coefficients, as `[expert][block]`.
        experts: The labels of the experts.
        blocks: The names of the blocks.
        name: The name of the recipe.
        path: The PNG file to write.

    Raises:
        HubError: matplotlib is not installed.
    """
    parts = [block.split(".") for block in blocks]
    # A prefix that all labels share carries no information, so it is removed.
    shared = len(list(takewhile(_is_constant, zip(*parts, strict=False))))
    shown = [".".join(part[min(shared, len(part) - 1) :]).removesuffix(".weight") for part in parts]
    figure, axes = _create_figure(0.55 * len(experts) + 5, min(60, 0.16 * len(blocks) + 2.2))
    limit = max((abs(value) for row in values for value in row), default=0) or 1.0
    columns = [list(column) for column in zip(*values, strict=True)]
    image = axes.imshow(columns, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(experts)), map(_label, experts), rotation=35, ha="right")
    axes.set_yticks(range(len(blocks)), map(_label, shown), fontsize=7 if len(blocks) > 20 else 9)
    axes.set_title(f"{_label(name)}: coefficients", fontsize=10)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def plot_similarity(rows: list[list[float]], experts: list[str], by: str, path: Path) -> None:
    """Plot a heat map of the cosines between experts, with the value in each cell.

    Args:
        rows: The cosines, as `[expert][expert]`, from -1 to 1.
        experts: The labels of the experts.
        by: The name of what is compared: `weights`, `gates` or `embeddings`.
        path: The PNG file to write.

    Raises:
        HubError: matplotlib is not installed.
    """
    figure, axes = _create_figure(0.7 * len(experts) + 3, 0.5 * len(experts) + 2)
    image = axes.imshow(rows, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(experts)), map(_label, experts), rotation=35, ha="right")
    axes.set_yticks(range(len(experts)), map(_label, experts))
    axes.set_title(f"cosines between experts by {by}", fontsize=10)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def _label(name: str) -> str:
    """Return a name as matplotlib shows it, without formulas between dollar signs."""
    return escape(name).replace("$", r"\$")


def _is_constant(column: tuple[str, ...]) -> bool:
    """Check whether all entries are the same."""
    return len(set(column)) == 1


def _create_figure(width: float, height: float) -> tuple[Any, Any]:
    """Create a figure of a size in inches, with its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HubError(
            "plots need matplotlib", "install it with: pip install 'experthub[plot]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    with open_atomically(path) as file:
        figure.savefig(file, format="png", dpi=130)
